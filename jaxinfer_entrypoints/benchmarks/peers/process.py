"""A runner as a process: see peers/runner_protocol.py for what is said."""

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

MAX_LINE_CHARACTERS = 1 << 20
ENDING_SECONDS = 10.0
DESCRIPTION = frozenset(("weights", "activations", "timed", "versions"))


class PeerError(Exception):
    """A peer is missing or has failed; the message is one line."""


@dataclass(frozen=True)
class PeerCommand:
    """A peer's command line. ``needs``: a file without which it is not there, and what makes it."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, str] | None = None

    def check(self) -> None:
        """Raises ``PeerError`` when it is not built."""
        if self.needs and not os.path.exists(self.needs[0]):
            raise PeerError(f"there is no {self.needs[0]}: {self.needs[1]}")


class PeerProcess:
    """A running runner; a context manager, so that none is left behind."""

    def __init__(self, peer: PeerCommand) -> None:
        self._is_lost = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        try:
            self._process = subprocess.Popen(
                peer.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, **peer.environment},
                start_new_session=True,  # its children are ended with it
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"cannot start {peer.command[0]}: {error.strerror}") from error
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_lost(self) -> bool:
        """True where nothing more can be asked: the peer has ended, or answers out of turn."""
        return self._is_lost

    def ready(self, timeout: float) -> dict[str, Any]:
        """Returns what the peer says that it is, once its model is loaded."""
        description = self._answer("ready", dict, timeout)
        if missing := DESCRIPTION - description.keys():
            raise PeerError(f"it does not say its {', '.join(sorted(missing))}")
        return description

    def rates(self, point: Mapping[str, Any], timeout: float) -> list[float]:
        """Tokens per second of each repetition of a point."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(point) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        rates = self._answer("rates", list, timeout)
        if not rates or not all(type(rate) in (int, float) and 0 < rate < 1e12 for rate in rates):
            raise PeerError(f"it answered no tokens per second: {rates!r:.100}")
        return [float(rate) for rate in rates]

    def _read(self) -> None:
        assert self._process.stdout
        while line := self._process.stdout.readline(MAX_LINE_CHARACTERS):
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, name: str, kind: type, timeout: float) -> Any:
        self._is_lost = True  # but for an answer, be it that a point failed
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise PeerError(f"no answer within {timeout:g} s") from None
        if not line:
            raise self._ended()
        try:
            answer = json.loads(line)
        except ValueError:
            raise PeerError(f"what it says is not JSON: {line.strip()!r:.100}") from None
        if not isinstance(answer, dict):
            raise PeerError(f"what it says is no object: {line.strip()!r:.100}")
        self._is_lost = False
        if isinstance(answer.get("error"), str):
            raise PeerError(answer["error"][:400])
        if not isinstance(answer.get(name), kind):
            raise PeerError(f"it does not say {name}: {line.strip()!r:.100}")
        return answer[name]

    def _ended(self) -> PeerError:
        try:
            status = self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return PeerError("it says nothing more, but does not end")
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines() or ["silently"]
        return PeerError(f"it ended with status {status}: {words[-1].strip()[:300]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Nothing that a runner does is worth waiting for. Once it was waited for, the number of its
        # group may be another's.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join()
        assert self._process.stdin
        assert self._process.stdout
        with suppress(OSError):  # a point that nobody read
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()
