"""The most memory that this process came to hold, as Linux counts it."""

from contextlib import suppress
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """From its making on. Pages of files that are read in place count as long as they stay."""

    def __init__(self) -> None:
        with suppress(OSError):
            _CLEAR.write_text("5")  # the highest so far is the present
        self.before = _read("VmRSS")

    @property
    def added(self) -> int:
        """Bytes so far; 0 where the system does not tell."""
        return max(0, _read("VmHWM") - self.before)

    def describe(self) -> str:
        """For people; "" where the system does not tell."""
        return f"{self.added / 2**20:.0f} MiB of host memory at most" if self.added else ""


def _read(field: str) -> int:
    with suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) << 10
    return 0
