"""scripts/chat.py as a process, on pipes or a pseudo-terminal, and a server that comes back."""

import asyncio
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.rpc.server import ServerOptions, serve
from tests.patience import HANG_SECONDS
from tests.serving.fakes import FakeEngine, served_model

ROOT = Path(__file__).parent.parent.parent
NUM_TRIES = 180  # five seconds each


class Process:
    """chat.py as a process, with pipes or, where ``terminal``, on a pseudo-terminal."""

    def __init__(self, address: str, *flags: str, terminal: bool = False) -> None:
        command = [sys.executable, str(ROOT / "scripts/chat.py"), "--address", address, *flags]
        environment = {**os.environ, "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
        self.output = ""
        self._lines = threading.Condition()
        if terminal:
            self._master, slave = pty.openpty()
            streams = (slave, slave, slave)
        else:
            (stdin, self._stdin), (self._master, slave) = os.pipe(), os.pipe()
            streams = (stdin, slave, slave)
        self._write_to = self._master if terminal else self._stdin
        self._open = {self._master, self._write_to}
        stdin, stdout, stderr = streams
        self.process = subprocess.Popen(
            command, env=environment, stdin=stdin, stdout=stdout, stderr=stderr
        )
        for end in set(streams):
            os.close(end)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # how a terminal ends
                data = b""
            if not data:
                return
            with self._lines:
                self.output += data.decode(errors="replace")
                self._lines.notify_all()

    def send(self, text: str) -> None:
        os.write(self._write_to, text.encode())

    def close_input(self) -> None:
        self._open.discard(self._write_to)
        os.close(self._write_to)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_prompt(self, pattern: str, after: int) -> int:
        """Interrupts a prompt until ``pattern`` comes; returns where the match ends.

        CPython shows a prompt, then waits for a key by ``select``: a signal in between is noticed
        with the next key or signal only, and a person would press Ctrl-C again.
        """
        for _ in range(NUM_TRIES):
            self.interrupt()
            found = self._find(pattern, after, HANG_SECONDS / NUM_TRIES)
            if found:
                return found.end()
        return self.expect(pattern, after)

    def expect(self, pattern: str, after: int = 0) -> int:
        """Waits for output; returns where the match ends."""
        found = self._find(pattern, after, HANG_SECONDS)
        assert found, f"no {pattern!r} in {self.output!r}"
        return found.end()

    def _find(self, pattern: str, after: int, seconds: float) -> re.Match[str] | None:
        with self._lines:
            return self._lines.wait_for(
                lambda: re.compile(pattern).search(self.output, after), timeout=seconds
            )

    def end(self) -> int:
        self.process.kill()
        self.process.wait(timeout=HANG_SECONDS)
        self._reader.join(timeout=HANG_SECONDS)
        for end in self._open:
            os.close(end)
        return self.process.returncode


@contextmanager
def chatting(address: str, *flags: str, terminal: bool = False) -> Iterator[Process]:
    process = Process(address, *flags, terminal=terminal)
    try:
        yield process
    finally:
        process.end()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def server_on(port: int, engine: FakeEngine) -> Iterator[None]:
    """A server on a given port, in a thread."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    ready = threading.Event()
    task = serve(
        lambda: served_model(engine),
        ServerOptions(port=port),
        on_ready=lambda _: ready.set(),
        stop=stop,
    )
    thread = threading.Thread(target=lambda: loop.run_until_complete(task))
    thread.start()
    try:
        assert ready.wait(timeout=HANG_SECONDS)
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=HANG_SECONDS)
        loop.close()
