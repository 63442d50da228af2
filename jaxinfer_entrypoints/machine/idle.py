"""Others' use of the machine that is being measured. Linux tells; elsewhere nobody does."""

import os
import time
from pathlib import Path

SAMPLE_SECONDS = 1.5


def wait_until_idle(most_cores: float, max_wait_seconds: float) -> float | None:
    """Waits until the whole machine uses less than ``most_cores``, but not for ever.

    Returns the cores that were in use in the last sample, None where nothing is known.
    """
    deadline = time.monotonic() + max_wait_seconds
    while True:
        before, begun = busy_seconds(), time.monotonic()
        if before is None:
            return None
        time.sleep(SAMPLE_SECONDS)
        cores = ((busy_seconds() or before) - before) / (time.monotonic() - begun)
        if cores < most_cores or time.monotonic() > deadline:
            return cores


def busy_seconds(path: Path = Path("/proc/stat")) -> float | None:
    """Seconds of all cores together that were not idle since the start of the machine.

    With what the host of a virtual machine took from it; None where nothing is known.
    """
    try:
        fields = path.read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    # cpu user nice system idle iowait irq softirq steal ...
    user, nice, system, _, _, *interrupts = (int(field) for field in fields[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int, proc: Path = Path("/proc")) -> float | None:
    """Processor seconds of a process and of its children that have ended; None if unknown."""
    try:
        text = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # After the name, which may hold anything, come state and further fields: utime, stime, cutime
    # and cstime are the 14th to 17th of all.
    fields = text.rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


class ForeignUse:
    """Cores that others than a process used on average, from its making to ``cores``."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._begun, self._busy, self._own = time.monotonic(), busy_seconds(), process_seconds(pid)

    def cores(self) -> float | None:
        """Up to now; None where nothing is known."""
        busy, own = busy_seconds(), process_seconds(self._pid)
        if busy is None or own is None or self._busy is None or self._own is None:
            return None
        others = (busy - self._busy) - (own - self._own)
        return max(0.0, others) / max(1e-3, time.monotonic() - self._begun)
