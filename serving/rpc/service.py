"""The gRPC servicer: checks a call, hands it to the loop, sends what comes back.

The one place where failures become status codes. Never blocks the event loop: what takes time in
proportion to the prompt runs in threads. Knows no sockets and no signals (serving/rpc/server.py).
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps

import grpc
from google.protobuf.message import DecodeError, Message

from jaxinfer.request import Request
from serving.loop import (
    DuplicateRequestError,
    EngineFailedError,
    NotServingError,
    RequestRefusedError,
    TooManyRequestsError,
)
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.replicas import Replicas
from serving.request_checks import check_request_id, check_token_ids
from serving.request_stream import RequestStream
from serving.rpc import responses
from serving.rpc.admission import admitted_request, check_wishes, prompt_encoder
from serving.rpc.validate import (
    is_on,
    refuse_unsupported,
    text_options,
)
from serving.served_model import ServedModel
from serving.text.output_text import output_texts

logger = logging.getLogger(__name__)

STATUS_CODES: dict[type[Exception], grpc.StatusCode] = {
    RequestRefusedError: grpc.StatusCode.INVALID_ARGUMENT,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    TooManyRequestsError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotServingError: grpc.StatusCode.UNAVAILABLE,
    EngineFailedError: grpc.StatusCode.INTERNAL,
}

# Texts of up to this many characters (ids, for decoding; log-probabilities, for a prompt) take
# less time than changing threads.
SHORT_PROMPT = 2048
# Details travel in a header of at most 8 KiB, where a character can take 12 bytes.
MAX_DETAIL_CHARACTERS = 500


@contextmanager
def _refusing_value_errors() -> Iterator[None]:
    """Around checks of what a client sent: there, and only there, a ValueError is its fault."""
    try:
        yield
    except ValueError as error:
        raise RequestRefusedError(str(error)) from error


type _Method[S, Q, R] = Callable[[S, Q, grpc.aio.ServicerContext], Coroutine[None, None, R]]


def _checked_call[S, Q: Message, R](method: _Method[S, Q, R]) -> _Method[S, Q, R]:
    """Refuses requests with fields that are not served, and answers failures by status code."""

    @wraps(method)
    async def call(self: S, request: Q, context: grpc.aio.ServicerContext) -> R:
        try:
            if isinstance(request, DecodeError):
                raise RequestRefusedError("the request is no message of this method")
            with _refusing_value_errors():
                refuse_unsupported(request)
            return await method(self, request, context)
        except Exception as error:
            for kind, code in STATUS_CODES.items():
                if isinstance(error, kind):
                    await context.abort(code, str(error)[:MAX_DETAIL_CHARACTERS])
            # What went wrong inside is for the log; it may hold other clients' text.
            logger.exception("%s failed", method.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")
            raise

    return call


@dataclass(frozen=True)
class _Serving:
    """All that exists only once the model is loaded."""

    served: ServedModel
    replicas: Replicas
    since: float  # time.monotonic()


class InferenceService:
    """Serves ``jaxinfer.v1.Inference``. Answers UNAVAILABLE until ``attach`` is called."""

    def __init__(self) -> None:
        self._serving: _Serving | None = None
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    def attach(self, served: ServedModel, replicas: Replicas) -> None:
        """Starts serving a model whose engines ``replicas`` runs."""
        self._serving = _Serving(served, replicas, time.monotonic())

    def close(self) -> None:
        """Ends the service's threads; no call may be running."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    # ---------------------------------------------------------------------------- methods

    @_checked_call
    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        # Writes instead of yielding: a generator suspended in a yield would not be told of a
        # cancellation, and would keep its pages until it is collected.
        arrived = time.monotonic()
        serving = self._ready()
        request_id = request.request_id if request.HasField("request_id") else uuid.uuid4().hex
        with _refusing_value_errors():
            check_request_id(request_id)
        # Before tokenizing, so that refusing costs little when there is too much to do.
        serving.replicas.check_accepts(request_id)
        admitted = await self._admit(request, request_id, serving.served)
        new_text = output_texts(
            serving.served.tokenizer, text_options(request.sampling, serving.served.default_ending)
        )
        stream = serving.replicas.submit(admitted, new_text)
        try:
            await context.send_initial_metadata((("jaxinfer-request-id", request_id),))
            await self._send_events(
                context, stream, not is_on(request, "stream"), serving.served, arrived
            )
        finally:
            # However this ends, also by cancellation: the pages go back.
            serving.replicas.close(stream)

    @_checked_call
    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        served = self._ready().served
        return pb.TokenizeResponse(
            token_ids=await self._encode(request, served),
            max_model_len=served.engine_config.max_model_len,
        )

    @_checked_call
    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        tokenizer = self._ready().served.tokenizer
        with _refusing_value_errors():
            token_ids = tuple(request.token_ids)
            check_token_ids(token_ids, tokenizer.vocab_size)
        skip = is_on(request, "skip_control_tokens")
        text = await self._in_thread(
            lambda: tokenizer.decode(token_ids, skip_control_tokens=skip), len(token_ids)
        )
        return pb.DetokenizeResponse(text=text)

    @_checked_call
    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return responses.model_info(self._ready().served)

    @_checked_call
    async def GetLoad(
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadResponse:
        serving = self._ready()
        stats = serving.replicas.stats
        return pb.GetLoadResponse(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_pages=stats.num_pages,
            num_free_pages=stats.num_free_pages,
            num_prompt_tokens=stats.num_prompt_tokens,
            num_output_tokens=stats.num_output_tokens,
            num_preemptions=stats.num_preemptions,
            uptime_seconds=time.monotonic() - serving.since,
            num_live_requests=serving.replicas.num_live_requests,
            max_live_requests=serving.replicas.max_live_requests,
            accepting=serving.replicas.is_accepting,
            num_cached_tokens=stats.num_cached_tokens,
            num_cached_pages=stats.num_cached_pages,
            num_drafted_tokens=stats.num_drafted_tokens,
            num_accepted_tokens=stats.num_accepted_tokens,
        )

    @_checked_call
    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        serving = self._ready()
        with _refusing_value_errors():
            check_request_id(request.request_id)
        return pb.AbortResponse(was_live=serving.replicas.abort(request.request_id))

    # ------------------------------------------------------------------- from call to request

    def _ready(self) -> _Serving:
        if self._serving is None:
            raise NotServingError("the model is being loaded")
        return self._serving

    async def _admit(
        self, message: pb.GenerateRequest, request_id: str, served: ServedModel
    ) -> Request:
        with _refusing_value_errors():
            sampling = check_wishes(message, served)
        token_ids = await self._encode(message, served)
        with _refusing_value_errors():
            return admitted_request(message, request_id, token_ids, sampling, served)

    async def _encode(
        self, message: pb.GenerateRequest | pb.TokenizeRequest, served: ServedModel
    ) -> Sequence[int]:
        with _refusing_value_errors():
            encode, num_characters = prompt_encoder(message, served.tokenizer)
            return await self._in_thread(encode, num_characters)

    async def _in_thread[T](self, work: Callable[[], T], size: int) -> T:
        if size <= SHORT_PROMPT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _send_events(
        self,
        context: grpc.aio.ServicerContext,
        stream: RequestStream,
        whole: bool,
        served: ServedModel,
        arrived: float,
    ) -> None:
        tokenizer, is_started = served.tokenizer, False
        async for told in stream.outputs(whole):
            output = told.output
            if not is_started:
                num_logprobs = len(output.prompt_logprobs) * (
                    1 + (stream.request.prompt_logprobs or 0)
                )
                started = await self._in_thread(
                    partial(responses.started, stream.request, output, tokenizer), num_logprobs
                )
                await context.write(started)
                is_started = True
            if output.token_ids or told.text:
                await context.write(responses.delta(told, tokenizer))
            if output.finish_reason is not None:
                timings = pb.Timings(
                    queue_seconds=output.queue_seconds,
                    total_seconds=time.monotonic() - arrived,
                )
                first_token_at = stream.first_token_at(output.choice)
                if first_token_at is not None:
                    timings.time_to_first_token_seconds = first_token_at - arrived
                await context.write(responses.finished(told, timings))
