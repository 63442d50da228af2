"""On a machine with an NVIDIA GPU, ``pytest -m gpu -s``: the server end to end, with its speed.

Skipped elsewhere. The server runs in a process of its own, so that this one stays on the CPU.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.client import AsyncClient
from tests.patience import HANG_SECONDS

ROOT = Path(__file__).parent.parent.parent
PROMPTS = json.loads((ROOT / "tests/data/smollm2_f32.json").read_text())["prompts"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/driver/nvidia").exists(), reason="no NVIDIA GPU"),
]


@contextmanager
def server(*flags: str) -> Iterator[str]:
    """The address of ``serve.py --gpu``."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/serve.py"), "--gpu", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout
    try:
        line = process.stdout.readline()
        match = re.fullmatch(r"SERVING .* at (127\.0\.0\.1:\d+)\n", line)
        assert match, line
        yield match.group(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=HANG_SECONDS) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


# float32 products run in TF32 there, which rounds to 10 bits; bfloat16 to 7. Tokens are compared
# as long as the reference's best logit leads by more than that.
@pytest.mark.parametrize(("dtype", "gap"), [("float32", 0.1), ("bfloat16", 0.5)])
def test_greedy_tokens_equal_the_reference(dtype: str, gap: float) -> None:
    async def run(target: str) -> None:
        async with AsyncClient(target) as client:
            completions = await asyncio.gather(
                *(
                    client.complete(prompt["prompt_ids"], max_tokens=64, ignore_eos=True)
                    for prompt in PROMPTS
                )
            )
            for prompt, completion in zip(PROMPTS, completions, strict=True):
                gaps = enumerate(prompt["greedy_top1_minus_top2"])
                clear = next((step for step, lead in gaps if lead <= gap), 64)
                tokens = list(completion.token_ids)
                assert tokens[:clear] == prompt["greedy_ids"][:clear], prompt["name"]
                same = sum(a == b for a, b in zip(tokens, prompt["greedy_ids"], strict=True))
                print(f"{dtype} {prompt['name']}: {clear} compared, {same} of 64 equal")
            for size in (1, 16, 64):
                begun = time.perf_counter()
                await asyncio.gather(
                    *(
                        client.complete([5 + i] * 32, max_tokens=256, ignore_eos=True)
                        for i in range(size)
                    )
                )
                seconds = time.perf_counter() - begun
                print(f"{dtype} {size} streams: {size * 256 / seconds:.0f} tok/s over gRPC")

    with server("--dtype", dtype, "--max-num-seqs", "64") as target:
        asyncio.run(run(target))
