"""The one thread that owns the engine, and the streams through which asyncio talks to it.

Two sides, no locks. The asyncio thread owns the table of live requests and every stream; the
engine's thread owns the engine. Commands go in through one queue, on which an idle engine blocks;
outputs come back once a step through ``call_soon_threadsafe``. Knows no gRPC, no text, no JAX.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import EngineStats, RequestOutput

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What the loop needs of an engine. Called from the loop's thread only."""

    def add(self, request: Request) -> None:
        """Queues a request. Raises ``ValueError`` when this engine can never serve it."""
        ...

    def abort(self, request_id: str) -> None:
        """Gives the request's pages back. Harmless when it is unknown or has finished."""
        ...

    def step(self) -> list[RequestOutput]:
        """Runs one step and tells what is new; called while ``has_unfinished``."""
        ...

    @property
    def has_unfinished(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...


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


class RequestStream:
    """The outputs of one request, read by one asyncio task.

    A reader that is slow finds the steps it missed merged into one output: what is held never
    exceeds the request's own ``max_tokens`` tokens, and nothing is lost. Leave it through
    ``EngineLoop.close``.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.first_token_at: float | None = None  # time.monotonic()
        self._last = RequestOutput(
            request_id=request.request_id,
            token_ids=(),
            num_prompt_tokens=len(request.prompt_token_ids),
        )
        self._is_read = True
        self._token_ids: list[int] = []
        self._num_output_tokens = 0
        self._finished = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def read(self) -> RequestOutput:
        """What is new, waiting for it if nothing is; the last one has a ``finish_reason``.

        Raises ``RequestRefusedError`` or ``EngineFailedError``; what came before is read first.
        """
        assert not (self._finished and self._is_read and self._error is None), "nothing to read"
        await self._changed.wait()
        self._changed.clear()
        if self._is_read:
            assert self._error is not None
            raise self._error
        if self._error is not None:
            self._changed.set()
        output = replace(self._last, token_ids=tuple(self._token_ids))
        self._token_ids = []
        self._is_read = True
        return output

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come; what came may still have to be read."""
        return self._finished

    def _put(self, output: RequestOutput) -> None:
        if self._finished:
            return
        if output.token_ids and self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self._token_ids.extend(output.token_ids)
        self._num_output_tokens += len(output.token_ids)
        self._last = output
        self._is_read = False
        self._finished = output.finish_reason is not None
        self._changed.set()

    def _abort(self) -> None:
        """Finishes the stream as aborted; late outputs of the engine are dropped."""
        self._put(
            replace(
                self._last,
                token_ids=(),
                finish_reason=FinishReason.ABORT,
                num_output_tokens=self._num_output_tokens,
            )
        )

    def _fail(self, error: Exception) -> None:
        if not self._finished:
            self._error = error
            self._finished = True
            self._changed.set()


@dataclass(frozen=True)
class _Add:
    stream: RequestStream


@dataclass(frozen=True)
class _Abort:
    stream: RequestStream


@dataclass(frozen=True)
class _Stop:
    pass


@dataclass
class _Delivery:
    """What one turn of the engine's thread has to tell the asyncio thread."""

    outputs: list[tuple[RequestStream, RequestOutput]] = field(default_factory=list)
    refused: list[tuple[RequestStream, str]] = field(default_factory=list)
    stats: EngineStats | None = None


class EngineLoop:
    """Runs an engine in a thread of its own for the asyncio loop that constructs it.

    Every method is called from that asyncio loop. ``max_live_requests`` bounds what is accepted
    and not finished, waiting requests included.
    """

    def __init__(self, engine: Engine, *, max_live_requests: int = 512) -> None:
        if max_live_requests < 1:
            raise ValueError(f"max_live_requests must be at least 1, got {max_live_requests}")
        self.max_live_requests = max_live_requests
        self._engine = engine
        self._asyncio_loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        self._live: dict[str, RequestStream] = {}
        self._none_live = asyncio.Event()
        self._none_live.set()
        self.ended = asyncio.Event()  # set when the thread has ended, well or not
        self._is_draining = False
        self._failure: BaseException | None = None
        self._stats = engine.stats
        # A daemon: a step that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------- the asyncio side

    @property
    def stats(self) -> EngineStats:
        """The engine's numbers as of its last step."""
        return self._stats

    @property
    def num_live_requests(self) -> int:
        return len(self._live)

    @property
    def is_accepting(self) -> bool:
        return not self._is_draining and self._failure is None

    def check_accepts(self, request_id: str) -> None:
        """Raises what ``submit`` would raise now; asked before work is put into a request."""
        if self._failure is not None:
            raise EngineFailedError("the engine has failed; the server is going down")
        if self._is_draining:
            raise NotServingError("the server is shutting down")
        if request_id in self._live:
            raise DuplicateRequestError(f"a live request has request_id {request_id!r} already")
        if len(self._live) >= self.max_live_requests:
            raise TooManyRequestsError(
                f"{len(self._live)} requests are live, the limit is {self.max_live_requests}"
            )

    def submit(self, request: Request) -> RequestStream:
        """Hands a request to the engine; its stream must be given to ``close`` in the end.

        Raises ``EngineFailedError``, ``NotServingError``, ``DuplicateRequestError`` or
        ``TooManyRequestsError``.
        """
        self.check_accepts(request.request_id)
        stream = RequestStream(request)
        self._live[request.request_id] = stream
        self._none_live.clear()
        self._inbox.put(_Add(stream))
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
        stream._abort()
        self.close(stream)
        return True

    def abort_all(self) -> None:
        """Finishes every live request with ``FinishReason.ABORT``."""
        for request_id in tuple(self._live):
            self.abort(request_id)

    async def drain(self, grace_seconds: float, stop_seconds: float = 10.0) -> None:
        """Accepts nothing more, lets what runs finish, aborts the rest, ends the thread.

        Running requests get ``grace_seconds``, the step in progress then ``stop_seconds``. Raises
        ``EngineFailedError`` when the engine failed, before or meanwhile, or does not come back
        from its step.
        """
        self._is_draining = True
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
            raise EngineFailedError(f"the engine did not end its step in {stop_seconds} s")
        if self._failure is not None:
            raise EngineFailedError(f"the engine failed: {self._failure!r}") from self._failure

    def _forget(self, stream: RequestStream) -> None:
        if self._live.get(stream.request.request_id) is stream:
            del self._live[stream.request.request_id]
        if not self._live:
            self._none_live.set()

    def _deliver(self, delivery: _Delivery) -> None:
        self._stats = delivery.stats or self._stats
        for stream, output in delivery.outputs:
            stream._put(output)
            if stream.is_finished:
                self._forget(stream)
        for stream, message in delivery.refused:
            stream._fail(RequestRefusedError(message))
            self._forget(stream)

    def _end(self, failure: BaseException | None) -> None:
        self._failure = failure
        for stream in tuple(self._live.values()):
            stream._fail(EngineFailedError("the engine failed; the server is going down"))
            self._forget(stream)
        self.ended.set()

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
        # The streams that the engine works for. An id is given to a new request only behind the
        # old one's abort in the inbox, so what is here under an id is what an abort is for.
        active: dict[str, RequestStream] = {}
        is_stopping = False
        while not is_stopping:
            delivery = _Delivery()
            for command in self._commands():
                match command:
                    case _Add(stream):
                        self._add(stream, active, delivery)
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
                    stream = active.get(output.request_id)
                    if stream is None:
                        continue
                    if output.finish_reason is not None:
                        del active[output.request_id]
                    delivery.outputs.append((stream, output))
            if active and not self._engine.has_unfinished:
                # Blocking on the inbox now would leave their clients waiting for ever.
                raise RuntimeError(f"the engine lost {sorted(active)}")
            delivery.stats = self._engine.stats
            self._tell(self._deliver, delivery)

    def _commands(self) -> list[_Add | _Abort | _Stop]:
        """What waits in the inbox; blocks for the first one while the engine has nothing to do."""
        commands = [] if self._engine.has_unfinished else [self._inbox.get()]
        while True:
            try:
                commands.append(self._inbox.get_nowait())
            except queue.Empty:
                return commands

    def _add(
        self, stream: RequestStream, active: dict[str, RequestStream], delivery: _Delivery
    ) -> None:
        try:
            self._engine.add(stream.request)
        except ValueError as error:
            delivery.refused.append((stream, str(error)))
        else:
            active[stream.request.request_id] = stream

    def _tell[T](self, callback: Callable[[T], None], value: T) -> None:
        try:
            self._asyncio_loop.call_soon_threadsafe(callback, value)
        except RuntimeError:
            # The asyncio loop is closed: the process is ending and nobody listens any more.
            logger.debug("the asyncio loop is closed")
