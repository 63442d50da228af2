"""Work in threads: what is short does not wait for what is long, and it is bounded."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serving.loop import TooManyRequestsError
from serving.work_threads import SHORT, TINY, WorkThreads
from tests.serving.running import run, until

LONG = SHORT + 1


class Blocked:
    """Work that runs until it is released, or the test is over."""

    end_of_test = threading.Event()

    def __init__(self) -> None:
        self.is_running, self.release = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.is_running.set()
        while not self.release.wait(timeout=0.01):
            assert not self.end_of_test.is_set()
        return "done"


@asynccontextmanager
async def work_threads(max_size: int = 100 * LONG) -> AsyncIterator[WorkThreads]:
    threads = WorkThreads(max_size)
    Blocked.end_of_test.clear()
    try:
        yield threads
    finally:
        Blocked.end_of_test.set()
        threads.close()


def test_short_work_is_done_while_any_number_of_long_ones_run_or_wait() -> None:
    async def test() -> None:
        async with work_threads() as threads:
            long = [Blocked() for _ in range(5)]
            waiting = [asyncio.create_task(threads.run(work, LONG)) for work in long]
            await until(lambda: long[0].is_running.is_set())
            for size in (1, TINY, TINY + 1, SHORT):
                assert await threads.run(lambda: "short", size) == "short"
            assert sum(work.is_running.is_set() for work in long) == 1
            for work in long:
                work.release.set()
            assert await asyncio.gather(*waiting) == ["done"] * 5

    run(test())


def test_the_smallest_that_waits_is_next() -> None:
    async def test() -> None:
        async with work_threads() as threads:
            blocked, order = [Blocked(), Blocked()], list[int]()
            first = [
                asyncio.create_task(threads.run(work, size))
                for work, size in zip(blocked, (LONG, SHORT), strict=True)
            ]
            await until(lambda: all(work.is_running.is_set() for work in blocked))
            sizes = (60_000, 5_000, 30_000, 4_000_000, 2_100)
            later = [
                asyncio.create_task(threads.run(lambda size=size: order.append(size), size))
                for size in sizes
            ]
            await until(lambda: sum(map(len, threads._waiting.values())) == len(sizes))
            ranks = [work for heap in threads._waiting.values() for work in heap]
            # Smaller first, unless a slow machine let enough time pass between two of them.
            expected = [sizes[work.number - 2] for work in sorted(ranks)]
            # The thread that takes all goes on alone.
            blocked[0].release.set()
            await asyncio.gather(first[0], *later)
            assert order == expected
            blocked[1].release.set()
            await first[1]

    run(test())


def test_too_much_work_is_refused_by_the_limit_and_short_work_has_room_of_its_own() -> None:
    async def test() -> None:
        async with work_threads(max_size=2 * LONG) as threads:
            long = [Blocked() for _ in range(2)]
            waiting = [
                asyncio.create_task(threads.run(work, LONG, bounded="letters")) for work in long
            ]
            await until(lambda: any(work.is_running.is_set() for work in long))
            says = (
                f"^{2 * LONG} letters are being worked on, the limit is {2 * LONG}; .* has {LONG}$"
            )
            with pytest.raises(TooManyRequestsError, match=says):
                await threads.run(lambda: None, LONG, bounded="letters")
            assert await threads.run(lambda: "short", SHORT, bounded="letters") == "short"
            # A client that leaves gives room back once its work, if it runs, is done.
            running = next(i for i in range(2) if long[i].is_running.is_set())
            waiting[running].cancel()
            await asyncio.sleep(0.05)
            assert threads._sizes[True] == 2 * LONG
            waiting[1 - running].cancel()
            await until(lambda: threads._sizes[True] == LONG)
            long[running].release.set()
            await until(lambda: threads._sizes == {False: 0, True: 0})

    run(test())


def test_work_is_not_kept_by_the_threads_or_by_clients_that_left() -> None:
    async def test() -> None:
        async with work_threads() as threads:
            blocked, done, left = Blocked(), Blocked(), Blocked()
            done.release.set()
            references = [weakref.ref(done), weakref.ref(left)]
            await threads.run(done, SHORT)
            first = asyncio.create_task(threads.run(blocked, LONG))
            await until(blocked.is_running.is_set)
            second = asyncio.create_task(threads.run(left, LONG))
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.wait((second,))
            assert second.cancelled()
            del done, left, second
            gc.collect()
            assert [reference() for reference in references] == [None, None]
            blocked.release.set()
            await first

    run(test())


def test_what_work_raises_is_raised() -> None:
    async def test() -> None:
        async with work_threads() as threads:
            for size in (1, SHORT, LONG):
                with pytest.raises(ZeroDivisionError):
                    await threads.run(lambda: 1 // 0, size)

    run(test())
