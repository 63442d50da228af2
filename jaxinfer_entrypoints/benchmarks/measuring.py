"""Parts that benchmarks share: running requests against the clock, describing the machine."""

import os
import platform
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxinfer.engine import Engine
from jaxinfer.request import Request
from jaxinfer.schedule import RequestOutput
from jaxinfer_entrypoints.loading.assembly import LoadedModel


@dataclass
class Measured:
    """Times of one run. Seconds since all requests were added."""

    seconds: float = 0.0
    decode_seconds: float = 0.0  # of calls without any chunk
    decode_tokens: int = 0
    token_times: dict[str, list[float]] = field(default_factory=dict)
    token_ids: dict[str, list[int]] = field(default_factory=dict)
    last_outputs: dict[str, RequestOutput] = field(default_factory=dict)
    max_running: int = 0

    @property
    def num_output_tokens(self) -> int:
        """New tokens of all requests."""
        return sum(len(times) for times in self.token_times.values())


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of random tokens: timing does not depend on which."""
    random = np.random.default_rng(seed)
    return [tuple(random.integers(0, vocab_size, length).tolist()) for length in lengths]


def requests_of(
    prompts: Sequence[tuple[int, ...]], max_tokens: Sequence[int] | int, **values: Any
) -> list[Request]:
    """Greedy requests through end-of-sequence tokens, named by their number."""
    if isinstance(max_tokens, int):
        max_tokens = [max_tokens] * len(prompts)
    return [
        Request(str(number), prompt, max_tokens=tokens, ignore_eos=True, **values)
        for number, (prompt, tokens) in enumerate(zip(prompts, max_tokens, strict=True))
    ]


def measure(engine: Engine, requests: Sequence[Request], name: str = "") -> Measured:
    """Adds all requests at once and steps until they are finished. A bar if it has a name."""
    for request in requests:
        engine.add(request)
    names = [request.request_id for request in requests]
    measured = Measured(
        token_times={name: [] for name in names}, token_ids={name: [] for name in names}
    )
    total = sum(request.max_tokens for request in requests)
    sent: deque[bool] = deque()  # of calls that are not read yet: had they chunks?
    begun = last = time.perf_counter()
    disable = None if name else True
    with tqdm(total=total, desc=name, unit="tok", file=sys.stderr, disable=disable) as bar:
        while engine.has_unfinished:
            before, chunk_tokens = engine.host_seconds, engine.stats.num_chunk_tokens
            outputs = engine.step()
            now, after = time.perf_counter(), engine.host_seconds
            if after.get("sent", 0) > before.get("sent", 0):
                sent.append(engine.stats.num_chunk_tokens > chunk_tokens)
            new_tokens = sum(len(output.token_ids) for output in outputs)
            if after.get("read", 0) > before.get("read", 0):
                if not sent.popleft():
                    measured.decode_seconds += now - last
                    measured.decode_tokens += new_tokens
                last = now
            for output in outputs:
                measured.token_times[output.request_id] += [now - begun] * len(output.token_ids)
                measured.token_ids[output.request_id] += output.token_ids
                measured.last_outputs[output.request_id] = output
            measured.max_running = max(measured.max_running, engine.stats.num_running)
            bar.update(new_tokens)
    measured.seconds = time.perf_counter() - begun
    return measured


def percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """``name_p50`` and ``name_p99``, None where there are no values."""
    return {
        f"{name}_p{p}": round(float(np.percentile(values, p)), 3) if values else None
        for p in (50, 99)
    }


def latencies(measured: Measured) -> dict[str, float | None]:
    """Milliseconds to the first token, and between tokens, over all requests of a run."""
    times = measured.token_times.values()
    first = [1e3 * each[0] for each in times if each]
    gaps = [1e3 * float(gap) for each in times for gap in np.diff(each)]
    return {**percentiles("ttft_ms", first), **percentiles("inter_token_ms", gaps)}


def describe(loaded: LoadedModel) -> dict[str, Any]:
    """Describes what was measured where, with which versions; peak memory of the process in MiB."""
    device = loaded.devices[0]
    device_memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "model": loaded.name,
        "dtype": loaded.spec.dtypes.matrices,
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
