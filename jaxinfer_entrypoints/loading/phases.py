"""Progress and time by phase, on stderr: stdout is for results."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int], None]


class Phases:
    """Times the phases of a start, shows a bar in a terminal, and prints the table at the end."""

    def __init__(self, started: float, quiet: bool = False) -> None:
        """``started`` is ``time.perf_counter()`` at the program's first line."""
        self._started, self._quiet = started, quiet
        self._rows: list[tuple[str, float, str]] = []

    @contextmanager
    def phase(
        self, name: str, unit: str = "", note: str | Callable[[], str] = ""
    ) -> Iterator[Progress]:
        """Times its body, which gets ``progress(done, total)``; ``unit`` is what is counted.

        ``note`` is printed behind that; one that is called is called at the end.
        """
        begun, last = time.perf_counter(), (0, 0)
        # A bar where somebody watches; elsewhere one line a phase is enough.
        scale = unit == "B"
        bar = tqdm(
            desc=name,
            unit=unit or "it",
            unit_scale=scale,
            unit_divisor=1024 if scale else 1000,
            file=sys.stderr,
            disable=True if self._quiet else None,
            leave=False,
            dynamic_ncols=True,
        )

        def progress(done: int, total: int) -> None:
            nonlocal last
            last = (done, total)
            bar.total = total
            bar.n = done
            bar.refresh()

        try:
            yield progress
        finally:
            bar.close()
        seconds = time.perf_counter() - begun
        counted = f"{last[1]} {unit}" if last[1] and not scale else ""
        if scale and last[1]:
            counted = f"{last[1] / 2**20:.0f} MiB"
        said = ", ".join(filter(None, (counted, note if isinstance(note, str) else note())))
        self._rows.append((name, seconds, said))
        if not self._quiet:
            print(f"{name:<10} {seconds:7.2f} s  {said}".rstrip(), file=sys.stderr)

    def say(self, line: str) -> None:
        """Tells something that is no phase."""
        if not self._quiet:
            print(line, file=sys.stderr)

    def add(self, name: str, seconds: float, note: str = "") -> None:
        """Notes a phase that was timed elsewhere."""
        self._rows.append((name, seconds, note))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, and ``total`` since the program's first line."""
        rows = {name: round(seconds, 3) for name, seconds, _ in self._rows}
        return rows | {"total": round(time.perf_counter() - self._started, 3)}

    def print_table(self) -> None:
        """The table of time by phase, with what no phase accounts for."""
        if self._quiet:
            return
        total = time.perf_counter() - self._started
        rest = total - sum(seconds for _, seconds, _ in self._rows)
        print("\nphase      seconds", file=sys.stderr)
        for name, seconds, note in [*self._rows, ("other", rest, ""), ("total", total, "")]:
            print(f"{name:<10} {seconds:7.2f}  {note}".rstrip(), file=sys.stderr)
        print(file=sys.stderr)
