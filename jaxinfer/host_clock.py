"""Time that the host spends in the phases of a call. Host only: never imports JAX."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class HostClock:
    """Seconds by phase since it was made, on the clock and on the processor.

    Where the device is the processor, its threads take it from the host's in the meantime.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu_seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time of its body to a phase."""
        begun, cpu_begun = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.cpu_seconds[phase] += time.thread_time() - cpu_begun
            self.seconds[phase] += time.perf_counter() - begun

    def count(self, name: str) -> None:
        """Counts a call."""
        self.seconds[name] += 1
