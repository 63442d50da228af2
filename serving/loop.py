"""The one thread that owns the engine, and the streams through which asyncio talks to it.

Two sides, no locks. The asyncio thread owns the table of live requests and every stream; the
engine's thread owns the engine and, once they are submitted, the texts of the choices: a stop
string is noticed before the next step is scheduled. Commands go in through one queue, on which an
idle engine blocks; outputs come back once a step through ``call_soon_threadsafe``. Knows no gRPC,
no tokenizer, no JAX.
"""

import asyncio
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from jaxinfer.request import Request
from jaxinfer.schedule import EngineStats, RequestOutput
from serving.request_stream import RequestStream, TextOutput

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """An engine as the loop needs it. Called from the loop's thread only."""

    def add(self, request: Request) -> None:
        """Queues a request. Raises ``ValueError`` when this engine can never serve it."""
        ...

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """Ends one choice, or all, and gives the pages back. Harmless when it is unknown."""
        ...

    def step(self) -> list[RequestOutput]:
        """Runs on and tells what is new, maybe nothing yet; called while ``has_unfinished``."""
        ...

    @property
    def has_unfinished(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...


class Text(Protocol):
    """The text of one choice. Used by the asyncio thread until it is submitted, then no more."""

    def add(self, output: RequestOutput) -> TextOutput:
        """The output with its text, cut and finished where a stop string ends it."""
        ...


class RequestRefusedError(Exception):
    """The request asks for something that cannot be served, now or later."""


class DuplicateRequestError(Exception):
    """A live request has this id already."""


class TooManyRequestsError(Exception):
    """As many requests are live as this server takes."""


class NotServingError(Exception):
    """The server is loading or shutting down."""


class EngineFailedError(Exception):
    """The engine raised: nothing can be served by this process any more."""


class EngineStuckError(EngineFailedError):
    """The engine does not come back from a step.

    Its thread cannot be stopped, and what ends JAX may wait for the device as it does: leave the
    process with ``os._exit``.
    """


@dataclass(frozen=True)
class _Add:
    stream: RequestStream
    texts: dict[int, Text]  # of the choices that run


@dataclass(frozen=True)
class _Abort:
    stream: RequestStream


@dataclass(frozen=True)
class _Stop:
    pass


def check_room(num_live: int, num_choices: int, limit: int) -> None:
    """Raises ``TooManyRequestsError`` where one more request would be too many."""
    if num_live + num_choices > limit:
        counts = f"; this one counts as {num_choices}, its choices" if num_choices > 1 else ""
        raise TooManyRequestsError(f"{num_live} requests are live, the limit is {limit}{counts}")


@dataclass
class _Delivery:
    """News that one turn of the engine's thread has for the asyncio thread."""

    outputs: list[tuple[RequestStream, TextOutput]] = field(default_factory=list)
    failed: list[tuple[RequestStream, Exception]] = field(default_factory=list)
    stats: EngineStats | None = None


class EngineLoop:
    """Runs an engine in a thread of its own for the asyncio loop that constructs it.

    Every method is called from that asyncio loop. ``max_live_requests`` bounds what is accepted
    and not finished, waiting requests included; a request of n choices counts as n, since it may
    take n slots and keep n outputs. ``on_end`` gets what the engine raised, or None,
    when the thread has ended. A turn of the thread, a step and what belongs to it, that takes more
    than ``step_timeout`` seconds is a failure too, after which nobody waits for the thread; None:
    however long it takes.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_live_requests: int = 512,
        step_timeout: float | None = None,
        on_end: Callable[[BaseException | None], None] = lambda _: None,
    ) -> None:
        if max_live_requests < 1:
            raise ValueError(f"max_live_requests must be at least 1, got {max_live_requests}")
        if step_timeout is not None and not step_timeout > 0:
            raise ValueError(f"step_timeout must be more than 0 s, or None, got {step_timeout}")
        self.max_live_requests = max_live_requests
        self._engine = engine
        self._on_end = on_end
        self._asyncio_loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        self._live: dict[str, RequestStream] = {}
        self._num_live = 0
        self._none_live = asyncio.Event()
        self._none_live.set()
        self.ended = asyncio.Event()  # set when the thread has ended, well or not, or is stuck
        self._is_draining = False
        self._failure: BaseException | None = None
        self._stats = engine.stats
        self._step_timeout = step_timeout
        # Written by the engine's thread: when its turn began, None while it waits for work.
        self._turn_began: float | None = None
        # A daemon: a step that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        if step_timeout is not None:
            self._watch(step_timeout, None)

    # ------------------------------------------------------------------- the asyncio side

    @property
    def stats(self) -> EngineStats:
        """The engine's numbers as of its last step."""
        return self._stats

    @property
    def num_live_requests(self) -> int:
        """A request of n choices counts as n until the last of them has ended."""
        return self._num_live

    @property
    def is_accepting(self) -> bool:
        return not self._is_draining and self._failure is None

    def check_accepts(self, request_id: str, num_choices: int = 1) -> None:
        """Raises what ``submit`` would raise now; asked before work is put into a request."""
        if self._failure is not None:
            raise EngineFailedError("the engine has failed; the server is going down")
        if self._is_draining:
            raise NotServingError("the server is shutting down")
        if request_id in self._live:
            raise DuplicateRequestError(f"a live request has request_id {request_id!r} already")
        check_room(self.num_live_requests, num_choices, self.max_live_requests)

    def submit(self, request: Request, new_text: Callable[[], Text]) -> RequestStream:
        """Hands a request to the engine; its stream must be given to ``close`` in the end.

        ``new_text`` makes the text of one choice. Raises ``EngineFailedError``,
        ``NotServingError``, ``DuplicateRequestError`` or ``TooManyRequestsError``.
        """
        self.check_accepts(request.request_id, request.n)
        texts = {choice: new_text() for choice in range(request.n)}
        stream = RequestStream(request)
        self._live[request.request_id] = stream
        self._num_live += request.n
        self._none_live.clear()
        self._inbox.put(_Add(stream, texts))
        return stream

    def close(self, stream: RequestStream) -> None:
        """Ends a stream; when its request still runs, it is aborted. Idempotent."""
        if self._live.get(stream.request.request_id) is stream:
            self._forget(stream)
            self._inbox.put(_Abort(stream))

    def abort(self, request_id: str) -> bool:
        """Finishes a live request with ``FinishReason.ABORT``; whether there was one."""
        stream = self._live.get(request_id)
        if stream is None:
            return False
        stream.abort()
        self.close(stream)
        return True

    def abort_all(self) -> None:
        """Finishes every live request with ``FinishReason.ABORT``."""
        for request_id in tuple(self._live):
            self.abort(request_id)

    def fail(self, failure: BaseException) -> None:
        """Ends as if this engine had raised ``failure``: another one of the server did."""
        if self._failure is None:
            self._failure = failure
            self._fail_streams()
            self._inbox.put(_Stop())

    def stop_accepting(self) -> None:
        """Refuses new requests from now on; those that are live go on."""
        self._is_draining = True

    async def drain(self, grace_seconds: float, stop_seconds: float = 10.0) -> None:
        """Accepts nothing more, lets what runs finish, aborts the rest, ends the thread.

        Running requests get ``grace_seconds``, the step in progress then ``stop_seconds``. Raises
        ``EngineFailedError`` when the engine failed, before or meanwhile, or does not come back
        from its step.
        """
        self.stop_accepting()
        finished = asyncio.create_task(self._none_live.wait())
        ended = asyncio.create_task(self.ended.wait())
        try:
            await asyncio.wait(
                (finished, ended), timeout=grace_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            self.abort_all()
            self._inbox.put(_Stop())
            await asyncio.wait((ended,), timeout=stop_seconds)
        finally:
            finished.cancel()
            ended.cancel()
        if not self.ended.is_set():
            raise EngineStuckError(f"the engine did not end its step in {stop_seconds} s")
        if isinstance(self._failure, EngineStuckError):
            raise self._failure
        if self._failure is not None:
            raise EngineFailedError(f"the engine failed: {self._failure!r}") from self._failure

    def _forget(self, stream: RequestStream) -> None:
        if self._live.get(stream.request.request_id) is stream:
            del self._live[stream.request.request_id]
            self._num_live -= stream.request.n
        if not self._live:
            self._none_live.set()

    def _deliver(self, delivery: _Delivery) -> None:
        self._stats = delivery.stats or self._stats
        for stream, output in delivery.outputs:
            stream.put(output)
            if stream.is_finished:
                self._forget(stream)
        for stream, error in delivery.failed:
            stream.fail(error)
            self._forget(stream)

    def _watch(self, timeout: float, late_turn: float | None) -> None:
        """Looks at the thread's turn again and again; ends the loop when one is late in two looks.

        Two, because the whole process may have been stopped meanwhile.
        """
        if self.ended.is_set():
            return
        began = self._turn_began
        is_late = began is not None and time.monotonic() - began > timeout
        if is_late and began == late_turn:
            self._give_up(f"the engine has not ended a step in {timeout:g} s (the step timeout)")
            return
        wait = min(timeout / 4, 5.0)
        self._asyncio_loop.call_later(wait, self._watch, timeout, began if is_late else None)

    def _give_up(self, reason: str) -> None:
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        logger.critical("%s; its thread is here:\n%s", reason, stack)
        self._inbox.put(_Stop())
        self._end(EngineStuckError(reason))

    def _end(self, failure: BaseException | None) -> None:
        if self.ended.is_set():
            return  # a thread that had been given up has come back
        self._failure = self._failure or failure
        self._fail_streams()
        self.ended.set()
        self._on_end(failure)

    def _fail_streams(self) -> None:
        reason = "the engine failed"
        if isinstance(self._failure, EngineStuckError):
            reason = str(self._failure)
        for stream in tuple(self._live.values()):
            stream.fail(EngineFailedError(f"{reason}; the server is going down"))
            self._forget(stream)

    # --------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._turn_until_stopped()
        except BaseException as error:
            # Not only Exception: whatever ends this thread must end the streams too.
            logger.critical("the engine failed", exc_info=True)
            failure = error
        self._tell(self._end, failure)

    def _turn_until_stopped(self) -> None:
        # The requests that the engine works for. An id is given to a new request only behind the
        # old one's abort in the inbox, so what is here under an id is what an abort is for.
        active: dict[str, _Add] = {}
        is_stopping = False
        delivery = _Delivery()
        while not is_stopping:
            delivery = _Delivery(stats=delivery.stats)
            for command in self._commands():
                match command:
                    case _Add():
                        self._add(command, active, delivery)
                    case _Abort(stream):
                        if active.pop(stream.request.request_id, None) is not None:
                            self._engine.abort(stream.request.request_id)
                    case _Stop():
                        for request_id in active:
                            self._engine.abort(request_id)
                        active.clear()
                        is_stopping = True
            if self._engine.has_unfinished and not is_stopping:
                for output in self._engine.step():
                    self._take(output, active, delivery)
            if active and not self._engine.has_unfinished:
                # Blocking on the inbox now would leave their clients waiting for ever.
                raise RuntimeError(f"the engine lost {sorted(active)}")
            told, delivery.stats = delivery.stats, self._engine.stats
            # An engine with work in flight often has nothing to say: that wakes nobody.
            if delivery.outputs or delivery.failed or delivery.stats != told:
                self._tell(self._deliver, delivery)

    def _commands(self) -> list[_Add | _Abort | _Stop]:
        """Takes all from the inbox; blocks for the first while the engine has nothing to do."""
        self._turn_began = None
        commands = [] if self._engine.has_unfinished else [self._inbox.get()]
        self._turn_began = time.monotonic()
        while True:
            try:
                commands.append(self._inbox.get_nowait())
            except queue.Empty:
                return commands

    def _add(self, command: _Add, active: dict[str, _Add], delivery: _Delivery) -> None:
        try:
            self._engine.add(command.stream.request)
        except ValueError as error:
            delivery.failed.append((command.stream, RequestRefusedError(str(error))))
        else:
            active[command.stream.request.request_id] = command

    def _take(self, output: RequestOutput, active: dict[str, _Add], delivery: _Delivery) -> None:
        """Gives an output its text; ends the choice in the engine when the text ended it."""
        request_id, choice = output.request_id, output.choice
        if request_id not in active or choice not in active[request_id].texts:
            return  # late: the choice has ended
        stream, texts = active[request_id].stream, active[request_id].texts
        try:
            text_output = texts[choice].add(output)
        except Exception as error:
            # That one request's text cannot be made is no reason to end the others.
            delivery.failed.append((stream, error))
            del active[request_id]
            self._engine.abort(request_id)
            return
        delivery.outputs.append((stream, text_output))
        if text_output.output.finish_reason is None:
            return
        del texts[choice]
        if not texts:
            del active[request_id]
        if output.finish_reason is None:
            self._engine.abort(request_id, choice)

    def _tell[T](self, callback: Callable[[T], None], value: T) -> None:
        try:
            self._asyncio_loop.call_soon_threadsafe(callback, value)
        except RuntimeError:
            # The asyncio loop is closed: the process is ending and nobody listens any more.
            logger.debug("the asyncio loop is closed")
