"""Two threads for work that takes time in proportion to its size, so that short work never waits
for long work.

Knows no gRPC, no tokenizer and no engine.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from serving.loop import TooManyRequestsError

# Work up to this size takes less time than changing threads.
TINY = 2048
# Work above this size is long: one of the two threads never takes it.
SHORT = 1 << 16
# Seconds of waiting that put work of one size before a new one that is smaller by 1: the smallest
# comes first, and nothing waits for ever.
_SECONDS_A_SIZE = 1e-5


@dataclass(order=True)
class _Work:
    rank: float
    number: int
    run: Callable[[], Any] | None = field(compare=False)
    future: Future[Any] = field(compare=False, default_factory=Future)

    def do(self) -> None:
        assert self.run is not None
        run, self.run = self.run, None
        try:
            result = run()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def forget_if_cancelled(self, future: Future[Any]) -> None:
        """Drops what a client that has left would have had done: it may hold a large prompt."""
        if future.cancelled():
            self.run = None


class WorkThreads:
    """Runs work in threads, smaller work before larger.

    Sizes of work that runs or waits are at most ``max_size`` in all, of short and of long work.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._changed = threading.Condition()
        self._is_closed = False
        self._numbers = itertools.count()
        # By whether it is long: the work that waits, and the sizes of all that is not done.
        self._waiting: dict[bool, list[_Work]] = {False: [], True: []}
        self._sizes = {False: 0, True: 0}
        self._threads = [
            threading.Thread(target=self._run, args=(kinds,), name="work")
            for kinds in ((False,), (False, True))
        ]
        for thread in self._threads:
            thread.start()

    async def run[T](self, work: Callable[[], T], size: int, *, bounded: str | None = None) -> T:
        """Returns what ``work`` does, and raises what it does.

        ``bounded`` names work that counts ("prompts of characters"), and for which
        ``TooManyRequestsError`` is raised where there is too much of it.
        """
        if size <= TINY:
            return work()
        is_long = size > SHORT
        made = _Work(time.monotonic() + size * _SECONDS_A_SIZE, next(self._numbers), work)
        made.future.add_done_callback(made.forget_if_cancelled)
        with self._changed:
            if bounded is not None:
                self._take_room(bounded, size, is_long, made.future)
            heapq.heappush(self._waiting[is_long], made)
            self._changed.notify_all()
        return await asyncio.wrap_future(made.future)

    def close(self) -> None:
        """Ends the threads; work that waits is cancelled."""
        with self._changed:
            self._is_closed = True
            waiting = [work for heap in self._waiting.values() for work in heap]
            self._changed.notify_all()
        for work in waiting:
            work.future.cancel()
        for thread in self._threads:
            thread.join()

    def _take_room(self, name: str, size: int, is_long: bool, future: Future[Any]) -> None:
        taken = self._sizes[is_long]
        if taken + size > self._max_size:
            raise TooManyRequestsError(
                f"{taken} {name} are being worked on, the limit is {self._max_size}; "
                f"this call has {size}"
            )
        self._sizes[is_long] += size

        def give_back(_: Future[Any]) -> None:
            # Only when it has ended: a client that leaves does not end work that runs.
            with self._changed:
                self._sizes[is_long] -= size

        future.add_done_callback(give_back)

    def _run(self, kinds: tuple[bool, ...]) -> None:
        while (work := self._next(kinds)) is not None:
            if work.future.set_running_or_notify_cancel():
                work.do()
            # Waiting for the next, this thread must not keep the last one's text.
            del work

    def _next(self, kinds: tuple[bool, ...]) -> _Work | None:
        with self._changed:
            while True:
                if self._is_closed:
                    return None
                if heaps := [self._waiting[kind] for kind in kinds if self._waiting[kind]]:
                    return heapq.heappop(min(heaps, key=lambda heap: heap[0]))
                self._changed.wait()
