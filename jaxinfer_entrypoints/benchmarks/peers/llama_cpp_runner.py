"""llama.cpp through its own programs: llama-bench, and llama-batched-bench for several sequences.

Executed by any Python. Both programs load the model anew at each point and warm up themselves.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from runner_protocol import Measure, run_peer

TIMEOUT_SECONDS = 600
BATCH_TOKENS, MICRO_BATCH_TOKENS = 2048, 512


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says where the programs are."""
    parser.add_argument("--programs", type=Path, required=True, help="folder with llama-bench")


def start(options: argparse.Namespace) -> tuple[dict[str, Any], Measure]:
    """Runs the smallest measurement, which tells the version and the weights."""
    common = ["-m", options.model, "-t", str(options.threads)]

    def bench(*arguments: str) -> dict[str, Any]:
        program = [str(options.programs / "llama-bench"), *common]
        return last_line(options, [*program, *arguments, "-r", "1", "-o", "jsonl"])

    def measure(point: dict[str, Any]) -> float:
        batch, length, steps = point["batch"], point["context"], point["steps"]
        if point["kind"] == "prefill":
            return float(bench("-p", str(length), "-n", "0")["avg_ts"])
        if batch == 1:
            return float(bench("-p", "0", "-n", str(steps), "-d", str(length))["avg_ts"])
        program = [str(options.programs / "llama-batched-bench"), *common]
        program += ["-tb", str(options.threads), "-c", str(max(8192, batch * (length + steps)))]
        program += ["-b", str(BATCH_TOKENS), "-ub", str(MICRO_BATCH_TOKENS), "-npl", str(batch)]
        program += ["-npp", str(length), "-ntg", str(steps), "--output-format", "jsonl"]
        return float(last_line(options, program)["speed_tg"])

    first = bench("-p", "1", "-n", "0")
    description = {
        "weights": f"the GGUF's own in place ({first['model_type']})",
        "activations": "8-bit blocks in products, KV cache "
        f"{first.get('type_k', '?')}/{first.get('type_v', '?')}",
        "timed": "forward passes without sampling",
        "versions": {"llama.cpp": f"{first['build_commit']} ({first['build_number']})"},
    }
    return description, measure


def last_line(options: argparse.Namespace, program: list[str]) -> dict[str, Any]:
    """The last JSON line that a program prints; raises ``ValueError`` with its last words."""
    libraries = {"LD_LIBRARY_PATH": str(options.programs)}
    done = subprocess.run(
        program,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, **libraries},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = " ".join((done.stderr or done.stdout).split())[-200:]
        raise ValueError(f"{program[0]} ended with status {done.returncode}: {words}")
    return json.loads(lines[-1])


if __name__ == "__main__":
    run_peer(start, add_options)
