"""Measures the engine: ``python scripts/bench.py offline --help``."""

import time

STARTED = time.perf_counter()

import argparse
import json
import os
import platform
import resource
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the packages lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from jaxinfer.engine import Engine
from jaxinfer.request import Request
from scripts.assembly import LoadedModel, add_engine_options, load_model, run_main
from scripts.phases import Phases


@dataclass
class Measured:
    """Times of one run. Seconds since all requests were added."""

    seconds: float = 0.0
    decode_seconds: float = 0.0  # of steps without any chunk
    decode_tokens: int = 0
    token_times: dict[str, list[float]] = field(default_factory=dict)


def main() -> None:
    """Entry point ``jaxinfer-bench``."""
    run_main(bench)


def bench() -> None:
    """Prints the figures of one offline run; random prompts, greedy, through end-of-sequence."""
    options = parse_arguments()
    phases = Phases(STARTED, quiet=options.quiet)
    phases.add("import", time.perf_counter() - STARTED)
    loaded = load_model(options, phases)
    phases.print_table()
    startup_seconds = phases.seconds
    length = options.prompt_len + options.output_len
    if length > loaded.engine_config.max_model_len:
        raise ValueError(
            f"--prompt-len {options.prompt_len} plus --output-len {options.output_len} is more "
            f"than max_model_len ({loaded.engine_config.max_model_len})"
        )
    random = np.random.default_rng(0)
    prompts = random.integers(0, loaded.model.vocab_size, (options.num_prompts, options.prompt_len))
    # Each prompt alone in memory once, so that nothing measured is a first time.
    measure(loaded.engine, prompts[:1], 2, "warm up")
    prefill = measure(loaded.engine, prompts, 1, "prefill")
    whole = measure(loaded.engine, prompts, options.output_len, "whole")
    figures = describe(loaded) | {
        "startup_seconds": startup_seconds,
        "prompt_len": options.prompt_len,
        "output_len": options.output_len,
        "num_prompts": options.num_prompts,
        "max_num_seqs": options.max_num_seqs,
        **summarize(prefill, whole, prompts.size),
    }
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:<28} {value}")


def measure(engine: Engine, prompts: np.ndarray, output_len: int, name: str) -> Measured:
    """Adds all prompts at once and steps until they are finished."""
    for number, prompt in enumerate(prompts):
        engine.add(
            Request(str(number), tuple(prompt.tolist()), max_tokens=output_len, ignore_eos=True)
        )
    measured = Measured(token_times={str(number): [] for number in range(len(prompts))})
    total = len(prompts) * output_len
    begun = time.perf_counter()
    with tqdm(total=total, desc=name, unit="tok", file=sys.stderr, disable=None) as bar:
        while engine.has_unfinished:
            chunk_tokens, step_begun = engine.stats.num_chunk_tokens, time.perf_counter()
            outputs = engine.step()
            now = time.perf_counter()
            new_tokens = sum(len(output.token_ids) for output in outputs)
            if engine.stats.num_chunk_tokens == chunk_tokens:
                measured.decode_seconds += now - step_begun
                measured.decode_tokens += new_tokens
            for output in outputs:
                measured.token_times[output.request_id] += [now - begun] * len(output.token_ids)
            bar.update(new_tokens)
    measured.seconds = time.perf_counter() - begun
    return measured


def summarize(prefill: Measured, whole: Measured, num_prompt_tokens: int) -> dict[str, Any]:
    """Rates in tokens per second and latencies in milliseconds.

    Prefill is a run of its own with one output token; decode counts the steps of the whole run
    that compute no prompt token; total is prompt and output tokens over the whole run.
    """
    first = [times[0] * 1e3 for times in whole.token_times.values()]
    gaps = [1e3 * gap for times in whole.token_times.values() for gap in np.diff(times)]
    output_tokens = sum(len(times) for times in whole.token_times.values())

    def percentiles(name: str, values: list[float]) -> dict[str, float | None]:
        return {
            f"{name}_ms_p{p}": round(float(np.percentile(values, p)), 3) if values else None
            for p in (50, 99)
        }

    decode = whole.decode_tokens / whole.decode_seconds if whole.decode_tokens else None
    return {
        "prefill_tokens_per_second": round(num_prompt_tokens / prefill.seconds, 2),
        "decode_tokens_per_second": decode and round(decode, 2),
        "total_tokens_per_second": round((num_prompt_tokens + output_tokens) / whole.seconds, 2),
        "output_tokens_per_second": round(output_tokens / whole.seconds, 2),
        **percentiles("ttft", first),
        **percentiles("inter_token", gaps),
        "seconds": round(whole.seconds, 3),
    }


def describe(loaded: LoadedModel) -> dict[str, Any]:
    """What was measured where, with which versions; peak memory of the process in MiB."""
    device = loaded.devices[0]
    device_memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "model": loaded.name,
        "dtype": loaded.dtypes.weights,
        "device": device.device_kind,
        "machine": f"{platform.machine()} {platform.system()}",
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "num_devices": len(loaded.devices),
        "num_cores": os.cpu_count(),
        "kv_cache_mib": round(loaded.engine.kv_cache_bytes / 2**20, 1),
        "peak_host_memory_mib": round(_peak_host_bytes() / 2**20, 1),
        "peak_device_memory_mib": device_memory and round(device_memory / 2**20, 1),
    }


def _peak_host_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    offline = commands.add_parser("offline", help="random prompts straight into the engine")
    offline.add_argument(
        "--prompt-len", type=int, default=128, help="tokens (default: %(default)s)"
    )
    offline.add_argument("--output-len", type=int, default=64, help="tokens (default: %(default)s)")
    offline.add_argument("--num-prompts", type=int, default=16, help="default: %(default)s")
    offline.add_argument("--json", action="store_true", help="print one line of JSON")
    offline.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_engine_options(offline)
    options = parser.parse_args()
    for name in ("prompt_len", "output_len", "num_prompts"):
        if not 1 <= getattr(options, name) <= 1 << 20:
            parser.error(f"--{name.replace('_', '-')} must be between 1 and {1 << 20}")
    return options


if __name__ == "__main__":
    main()
