"""The gRPC servicer: checks a call, hands it to the loop, sends what comes back.

The one place where failures become status codes. Never blocks the event loop: what takes time in
proportion to the prompt runs in threads. Knows no sockets and no signals (serving/server.py).
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps

import grpc
from google.protobuf.message import Message

from jaxinfer.request import LIMITS, FinishReason, Request
from jaxinfer.schedule import RequestOutput
from serving.loop import (
    DuplicateRequestError,
    EngineFailedError,
    EngineLoop,
    NotServingError,
    RequestRefusedError,
    RequestStream,
    TooManyRequestsError,
)
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.served_model import Detokenizer, ServedModel, package_version
from serving.validate import (
    DEFAULT_MAX_TOKENS,
    SUPPORTED_FIELDS,
    check_prompt,
    check_request_id,
    check_token_ids,
    max_tokens_in_effect,
    refuse_unsupported,
    sampling_params,
)

logger = logging.getLogger(__name__)

STATUS_CODES: dict[type[Exception], grpc.StatusCode] = {
    RequestRefusedError: grpc.StatusCode.INVALID_ARGUMENT,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    TooManyRequestsError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotServingError: grpc.StatusCode.UNAVAILABLE,
    EngineFailedError: grpc.StatusCode.INTERNAL,
}

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}

# Texts of up to this many characters (ids, for decoding) take less time than changing threads.
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
    """What exists only once the model is loaded."""

    served: ServedModel
    loop: EngineLoop
    since: float  # time.monotonic()


class InferenceService:
    """Serves ``jaxinfer.v1.Inference``. Answers UNAVAILABLE until ``attach`` is called."""

    def __init__(self) -> None:
        self._serving: _Serving | None = None
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    def attach(self, served: ServedModel, loop: EngineLoop) -> None:
        """Starts serving a model whose engine ``loop`` runs."""
        self._serving = _Serving(served, loop, time.monotonic())

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
        serving.loop.check_accepts(request_id)
        stream = serving.loop.submit(await self._admit(request, request_id, serving.served))
        try:
            await context.send_initial_metadata((("jaxinfer-request-id", request_id),))
            is_streaming = request.stream or not request.HasField("stream")
            outputs = _outputs(stream) if is_streaming else _whole_output(stream)
            detokenizer = serving.served.new_detokenizer()
            await _send_events(context, stream, outputs, detokenizer, arrived)
        finally:
            # However this ends, also by cancellation: the pages go back.
            serving.loop.close(stream)

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
        skip = request.skip_control_tokens or not request.HasField("skip_control_tokens")
        text = await self._in_thread(
            lambda: tokenizer.decode(token_ids, skip_control_tokens=skip), len(token_ids)
        )
        return pb.DetokenizeResponse(text=text)

    @_checked_call
    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return _model_info(self._ready().served)

    @_checked_call
    async def GetLoad(
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadResponse:
        serving = self._ready()
        stats = serving.loop.stats
        return pb.GetLoadResponse(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_pages=stats.num_pages,
            num_free_pages=stats.num_free_pages,
            num_prompt_tokens=stats.num_prompt_tokens,
            num_output_tokens=stats.num_output_tokens,
            num_preemptions=stats.num_preemptions,
            uptime_seconds=time.monotonic() - serving.since,
            num_live_requests=serving.loop.num_live_requests,
            max_live_requests=serving.loop.max_live_requests,
            accepting=serving.loop.is_accepting,
        )

    @_checked_call
    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        serving = self._ready()
        with _refusing_value_errors():
            check_request_id(request.request_id)
        return pb.AbortResponse(was_live=serving.loop.abort(request.request_id))

    # ------------------------------------------------------------------- from call to request

    def _ready(self) -> _Serving:
        if self._serving is None:
            raise NotServingError("the model is being loaded")
        return self._serving

    async def _admit(
        self, request: pb.GenerateRequest, request_id: str, served: ServedModel
    ) -> Request:
        with _refusing_value_errors():
            sampling = sampling_params(request.sampling)
        token_ids = await self._encode(request, served)
        with _refusing_value_errors():
            max_model_len = served.engine_config.max_model_len
            admitted = Request(
                request_id=request_id,
                prompt_token_ids=tuple(token_ids),
                max_tokens=max_tokens_in_effect(request.sampling, len(token_ids), max_model_len),
                sampling=sampling,
                eos_token_ids=served.tokenizer.eos_token_ids,
                ignore_eos=request.sampling.ignore_eos,
            )
            admitted.check_fits(served.model.vocab_size, max_model_len)
        return admitted

    async def _encode(
        self, request: pb.GenerateRequest | pb.TokenizeRequest, served: ServedModel
    ) -> list[int]:
        tokenizer = served.tokenizer
        with _refusing_value_errors():
            num_characters = check_prompt(request, tokenizer.has_chat_template)
            match request.WhichOneof("prompt"):
                case "text":
                    special = request.add_special_tokens or not request.HasField(
                        "add_special_tokens"
                    )
                    return await self._in_thread(
                        lambda: tokenizer.encode(request.text, add_special_tokens=special),
                        num_characters,
                    )
                case "chat":
                    messages = [
                        {"role": message.role, "content": message.content}
                        for message in request.chat.messages
                    ]
                    return await self._in_thread(
                        lambda: tokenizer.encode_chat(messages), num_characters
                    )
                case _:
                    assert isinstance(request, pb.GenerateRequest)
                    return list(request.token_ids.ids)

    async def _in_thread[T](self, work: Callable[[], T], size: int) -> T:
        if size <= SHORT_PROMPT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


async def _outputs(stream: RequestStream) -> AsyncIterator[RequestOutput]:
    while True:
        output = await stream.read()
        yield output
        if output.finish_reason is not None:
            return


async def _whole_output(stream: RequestStream) -> AsyncIterator[RequestOutput]:
    token_ids: list[int] = []
    async for output in _outputs(stream):
        token_ids.extend(output.token_ids)
        if output.finish_reason is not None:
            yield replace(output, token_ids=tuple(token_ids))


async def _send_events(
    context: grpc.aio.ServicerContext,
    stream: RequestStream,
    outputs: AsyncIterator[RequestOutput],
    detokenizer: Detokenizer,
    arrived: float,
) -> None:
    is_started = False
    async for output in outputs:
        if not is_started:
            started = _started(stream.request, output)
            await context.write(pb.GenerateResponse(started=started))
            is_started = True
        text = detokenizer.add(output.token_ids)
        if output.finish_reason is not None:
            text += detokenizer.finish()
        if output.token_ids or text:
            delta = pb.Delta(choice=0, text=text, token_ids=output.token_ids)
            await context.write(pb.GenerateResponse(delta=delta))
        if output.finish_reason is not None:
            timings = pb.Timings(
                queue_seconds=output.queue_seconds,
                total_seconds=time.monotonic() - arrived,
            )
            if stream.first_token_at is not None:
                timings.time_to_first_token_seconds = stream.first_token_at - arrived
            await context.write(pb.GenerateResponse(finished=_finished(output, timings)))


def _started(request: Request, output: RequestOutput) -> pb.Started:
    return pb.Started(
        request_id=request.request_id,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_cached_tokens=output.num_cached_tokens,
        seeds=(request.sampling.seed,) if request.sampling.temperature > 0 else (),
        max_tokens=request.max_tokens,
    )


def _finished(output: RequestOutput, timings: pb.Timings) -> pb.Finished:
    assert output.finish_reason is not None
    finished = pb.Finished(
        choice=0,
        reason=FINISH_REASONS[output.finish_reason],
        usage=pb.Usage(
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            num_output_tokens=output.num_output_tokens,
            num_preemptions=output.num_preemptions,
        ),
        timings=timings,
    )
    if output.finish_reason is FinishReason.STOP and output.token_ids:
        finished.stop_token_id = output.token_ids[-1]
    return finished


def _model_info(served: ServedModel) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        model_name=served.name,
        architecture=served.model.architecture,
        max_model_len=served.engine_config.max_model_len,
        max_position_embeddings=served.model.max_position_embeddings,
        vocab_size=served.model.vocab_size,
        weights_dtype=served.dtypes.weights,
        activations_dtype=served.dtypes.activations,
        kv_cache_dtype=served.dtypes.kv_cache,
        quantization=served.quantization,
        num_pages=served.engine_config.num_pages,
        page_size=served.engine_config.page_size,
        max_num_seqs=served.engine_config.max_num_seqs,
        max_num_batched_tokens=served.engine_config.max_num_batched_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        limits=[
            pb.FieldLimit(name=name, low=limit.low, high=limit.high, low_excluded=limit.above)
            for name, limit in LIMITS.items()
        ],
        supported_fields=sorted(
            f"{message}.{field}" for message, fields in SUPPORTED_FIELDS.items() for field in fields
        ),
        version=package_version(),
        eos_token_ids=served.tokenizer.eos_token_ids,
        bos_token_id=served.tokenizer.bos_token_id,
        has_chat_template=served.tokenizer.has_chat_template,
    )
