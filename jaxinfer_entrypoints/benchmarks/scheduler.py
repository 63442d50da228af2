"""The scheduler's cost when much waits and much is cached: part of ``bench.py host``.

No model and no device: every row yields a token at once.
"""

import time
from itertools import chain
from typing import Any

import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.request import Request
from jaxinfer.schedule import Schedule, SequenceOutput, StepOutput
from jaxinfer.scheduler import Scheduler
from jaxinfer.sequence import Sequence

NUM_WAITING = 10_000
NUM_CACHED_PAGES = 100_000
PAGE_SIZE = 16
MAX_MODEL_LEN = 8192


def scheduler_times(num_running: int) -> dict[str, Any]:
    """Milliseconds of ``schedule`` and ``update`` together, a step, over 300 steps.

    In most of them requests finish and others are admitted, whose prompts are found in the cache
    to a half; ``longest_lookup_ms`` is a single prompt of ``MAX_MODEL_LEN`` tokens, all found.
    """
    config = EngineConfig(
        max_num_seqs=num_running,
        max_model_len=MAX_MODEL_LEN,
        page_size=PAGE_SIZE,
        num_pages=NUM_CACHED_PAGES + num_running * 64,
    )
    scheduler = Scheduler(config)
    random = np.random.default_rng(0)
    shared = [
        tuple(random.integers(0, 50_000, MAX_MODEL_LEN - 1).tolist())
        for _ in range(-(-NUM_CACHED_PAGES // (MAX_MODEL_LEN // PAGE_SIZE)))
    ]
    for number, prompt in enumerate(shared):
        scheduler.add(Request(f"cached {number}", prompt, 1))
        while scheduler.has_unfinished:
            _step(scheduler)
    cached = scheduler.stats.num_cached_pages
    for number in range(NUM_WAITING):
        prompt = shared[number % len(shared)][:128] + (number,) * 128
        scheduler.add(Request(f"waiting {number}", prompt, 8 + number % 57, ignore_eos=True))
    for _ in range(20):
        _step(scheduler)
    times = [_step(scheduler) for _ in range(300)]
    waiting = scheduler.stats.num_waiting

    sequence = Sequence(Request("", shared[-1], 1), 0, (0.0, 0, 0), "shared:")
    begun = time.perf_counter()
    found = scheduler.prefix_cache.find(sequence)
    lookup = time.perf_counter() - begun
    return {
        "num_running": num_running,
        "num_waiting": waiting,
        "num_cached_pages": cached,
        "step_ms_p50": round(1e3 * float(np.percentile(times, 50)), 4),
        "step_ms_p99": round(1e3 * float(np.percentile(times, 99)), 4),
        "longest_lookup_pages": len(found),
        "longest_lookup_ms": round(1e3 * lookup, 4),
    }


def _step(scheduler: Scheduler) -> float:
    """Seconds of one step's planning and bookkeeping."""
    begun = time.perf_counter()
    schedule = scheduler.schedule()
    middle = time.perf_counter()
    output = _output(schedule)
    again = time.perf_counter()
    scheduler.update(schedule, output)
    return time.perf_counter() - again + middle - begun


def _output(schedule: Schedule) -> StepOutput:
    return StepOutput(
        tuple(
            SequenceOutput((7,) if sequence.samples else ())
            for sequence in chain(schedule.decodes, schedule.chunks)
        )
    )
