"""Several engines in one process: each has its own thread, a request is given to one of them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import fields

from jaxinfer.request import Request
from jaxinfer.schedule import EngineStats
from serving.loop import Engine, EngineLoop, EngineStuckError, Text, check_room
from serving.request_stream import RequestStream


class Replicas:
    """Runs engines for the asyncio loop that constructs it, and looks like one ``EngineLoop``.

    A new request goes to the engine with the fewest live ones, of those the first. When one engine
    fails, all do. ``max_live_requests`` is over all, and counts as that of ``EngineLoop``, whose
    errors these are; ``step_timeout`` is each engine's.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        max_live_requests: int = 512,
        step_timeout: float | None = None,
    ) -> None:
        if not engines:
            raise ValueError("there is no engine; at least 1 is needed")
        self.max_live_requests = max_live_requests
        self.ended = asyncio.Event()  # set when one engine has ended, well or not, or is stuck
        self._loops = [
            EngineLoop(
                engine,
                max_live_requests=max_live_requests,
                step_timeout=step_timeout,
                on_end=self._end_all,
            )
            for engine in engines
        ]

    @property
    def stats(self) -> EngineStats:
        """The sums of the engines' numbers as of their last steps."""
        each = [loop.stats for loop in self._loops]
        return EngineStats(
            **{field.name: sum(getattr(s, field.name) for s in each) for field in fields(each[0])}
        )

    @property
    def num_live_requests(self) -> int:
        return sum(loop.num_live_requests for loop in self._loops)

    @property
    def is_accepting(self) -> bool:
        return all(loop.is_accepting for loop in self._loops)

    def check_accepts(self, request_id: str, num_choices: int = 1) -> None:
        """Raises what ``submit`` would raise now; asked before work is put into a request."""
        for loop in self._loops:
            loop.check_accepts(request_id, num_choices)
        check_room(self.num_live_requests, num_choices, self.max_live_requests)

    def submit(self, request: Request, new_text: Callable[[], Text]) -> RequestStream:
        """Hands a request to an engine; its stream must be given to ``close`` in the end."""
        self.check_accepts(request.request_id, request.n)
        loop = min(self._loops, key=lambda loop: loop.num_live_requests)
        return loop.submit(request, new_text)

    def close(self, stream: RequestStream) -> None:
        """Ends a stream; when its request still runs, it is aborted. Idempotent."""
        for loop in self._loops:
            loop.close(stream)

    def abort(self, request_id: str) -> bool:
        """Finishes a live request with ``FinishReason.ABORT``; whether there was one."""
        return any(loop.abort(request_id) for loop in self._loops)

    def abort_all(self) -> None:
        """Finishes every live request with ``FinishReason.ABORT``."""
        for loop in self._loops:
            loop.abort_all()

    async def drain(self, grace_seconds: float, stop_seconds: float = 10.0) -> None:
        """Drains all engines at once, each as ``EngineLoop.drain`` does.

        Raises ``EngineFailedError`` of the first engine that has one, of one that is stuck before
        others.
        """
        for loop in self._loops:
            loop.stop_accepting()
        drains = (loop.drain(grace_seconds, stop_seconds) for loop in self._loops)
        results = await asyncio.gather(*drains, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in sorted(failures, key=lambda f: not isinstance(f, EngineStuckError)):
            raise failure

    def _end_all(self, failure: BaseException | None) -> None:
        if failure is not None:
            for loop in self._loops:
                loop.fail(failure)
        self.ended.set()
