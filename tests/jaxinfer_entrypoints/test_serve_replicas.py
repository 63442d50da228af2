"""``serve.py --data-parallel 2`` as a process: two engines behind one port."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serving.client import AsyncClient
from serving.client.options import GenerateOptions
from tests.jaxinfer_entrypoints.conftest import SIZES
from tests.patience import HANG_SECONDS

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.thorough("whole programs")
def test_replicas_give_the_same_answers(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = str(tmp_path_factory.getbasetemp() / "cache")  # of the other tests of scripts
    command = [sys.executable, str(ROOT / "scripts/serve.py"), "--port", "0", *SIZES]
    process = subprocess.Popen(
        [*command, "--model", str(model_path), "--data-parallel", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": cache},
    )
    assert process.stdout
    assert process.stderr
    try:
        match = re.fullmatch(
            r"SERVING tiny on 2 x cpu in float32 at (127\.0\.0\.1:\d+)\n", process.stdout.readline()
        )
        assert match
        asyncio.run(check(match.group(1)))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0
        # What goes where, before the first request.
        for name in ("parameters", "kv cache", "slots", "temporaries", "total", "replica 2"):
            assert f"\n{name}" in errors
        total, everything = (
            re.search(rf"\nmemory .*\n{name} +([\d.]+)", errors, re.DOTALL)
            for name in ("total", "all devices")
        )
        assert total
        assert everything
        assert float(everything[1]) == pytest.approx(2 * float(total[1]), abs=0.2)
        assert "  2, 2 replicas\n" in errors
    finally:
        process.kill()
        process.communicate()


async def check(target: str) -> None:
    """Six requests at once, three an engine with two slots each, against each on its own."""
    options: GenerateOptions = {"max_tokens": 9, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    prompts = [[1 + i, 5, 2 + i] for i in range(6)]
    async with AsyncClient(target) as client:
        together = await asyncio.gather(*(client.complete(p, **options) for p in prompts))
        alone = [await client.complete(prompt, **options) for prompt in prompts]
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        assert len({completion.token_ids for completion in alone}) > 1
        info, load = await client.model_info(), await client.load()
        assert info.max_num_seqs == 4
        assert load.num_pages == info.num_pages == load.num_free_pages
