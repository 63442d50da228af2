"""generate.py on three forced CPU devices: the default model has 3 kv heads, and 49,152 tokens."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time there was"]
DECISIVE_GAP = 0.02  # nats between the best two tokens; sums are taken in another order

pytestmark = pytest.mark.thorough("tensor parallelism of the default model")


def generate(num_devices: int, folder: Path) -> list[dict[str, Any]]:
    """Answers of a process of its own, since devices are made when JAX starts."""
    lines = folder / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    script = ROOT / "scripts" / "generate.py"
    command = [sys.executable, str(script), "--cpu", "--tensor-parallel", str(num_devices)]
    command += ["--input", str(lines), "--json", "--quiet", "--ignore-eos", "--max-tokens", "24"]
    command += ["--logprobs", "2", "--max-model-len", "256", "--kv-memory", "64MiB"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.model
def test_three_devices_give_the_tokens_of_one(tmp_path: Path) -> None:
    num_compared = 0
    for one, three in zip(generate(1, tmp_path), generate(3, tmp_path), strict=True):
        for i, entry in enumerate(one["logprobs"]):
            best, second = sorted((top[1] for top in entry["top"]), reverse=True)[:2]
            if best - second < DECISIVE_GAP:
                break
            assert one["token_ids"][i] == three["token_ids"][i]
            num_compared += 1
    assert num_compared > 40
