"""The gRPC servicer: checks a call, hands it to the loop, sends what comes back.

Never blocks the event loop: what takes time in proportion to the prompt runs in threads. A message
is held until it has become a request, no longer. Knows no sockets and no signals
(serving/rpc/server.py), and nothing of how messages are received (serving/rpc/reception.py).
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial, wraps

import grpc
from google.protobuf.message import Message

from jaxinfer.request import LIMITS, Request
from serving.loop import NotServingError, RequestRefusedError, check_room
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.replicas import Replicas
from serving.request_checks import check_request_id, check_token_ids
from serving.request_stream import RequestStream
from serving.rpc import responses
from serving.rpc.admission import admitted_request, check_wishes, prompt_encoder
from serving.rpc.statuses import abort, status_of
from serving.rpc.validate import is_on, refuse_unsupported, text_options
from serving.served_model import ServedModel, Tokenizer
from serving.text.output_text import TextOptions, output_texts
from serving.work_threads import WorkThreads

# Characters of prompts that are tokenized or wait for it, at most: four of the longest. Those up to
# work_threads.SHORT have as much again, so that long ones do not take their room.
MAX_TOKENIZED_CHARACTERS = 4 * int(LIMITS["prompt_characters"].high)


class _RefusingValueErrors:
    """Around checks of what a client sent: there, and only there, a ValueError is its fault.

    No generator: that would leave a cycle of frames behind, with the message in one of them.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ValueError):
            raise RequestRefusedError(str(error)) from None


type _Method[S, Q, R] = Callable[[S, Q, grpc.aio.ServicerContext], Coroutine[None, None, R]]


def _checked_call[S, Q: Message, R](method: _Method[S, Q, R]) -> _Method[S, Q, R]:
    """Refuses requests with fields that are not served, and answers failures by status code."""

    @wraps(method)
    async def call(self: S, request: Q | None, context: grpc.aio.ServicerContext) -> R:
        assert request is not None
        try:
            with _RefusingValueErrors():
                refuse_unsupported(request)
            answer = method(self, request, context)
            # The method alone holds it now, and may let go of it early: it may be large.
            request = None
            return await answer
        except grpc.aio.InternalError:
            # A write that failed: nobody is there to be told, and gRPC takes note in silence.
            raise asyncio.CancelledError from None
        except Exception as error:
            status = status_of(error, method.__name__)
        request = None
        await abort(context, status)

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
        self._threads = WorkThreads(MAX_TOKENIZED_CHARACTERS)
        self._num_admitting = 0  # Generate calls whose message has come, not live yet

    def attach(self, served: ServedModel, replicas: Replicas) -> None:
        """Starts serving a model whose engines ``replicas`` runs."""
        self._serving = _Serving(served, replicas, time.monotonic())

    def check_generate(self) -> None:
        """Raises what ``Generate`` would be refused with now, whatever it asked for.

        It is cheap: asked before a message is read, when there is far too much to do.
        """
        replicas = self._ready().replicas
        replicas.check_accepts("")
        num_live = replicas.num_live_requests + self._num_admitting
        check_room(num_live, 1, replicas.max_live_requests)

    def close(self) -> None:
        """Ends the service's threads; no call may be running."""
        self._threads.close()

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
        with _RefusingValueErrors():
            check_request_id(request_id)
        # Before tokenizing, so that refusing costs little when there is too much to do.
        self.check_generate()
        serving.replicas.check_accepts(request_id)
        is_whole = not is_on(request, "stream")
        admission = self._admit(request, request_id, serving.served)
        del request
        self._num_admitting += 1
        try:
            admitted, options = await admission
        finally:
            self._num_admitting -= 1
        new_text = output_texts(serving.served.tokenizer, options)
        stream = serving.replicas.submit(admitted, new_text)
        try:
            await context.send_initial_metadata((("jaxinfer-request-id", request_id),))
            await self._send_events(context, stream, is_whole, serving.served, arrived)
        finally:
            # However this ends, also by cancellation: the pages go back.
            serving.replicas.close(stream)

    @_checked_call
    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        served = self._ready().served
        return pb.TokenizeResponse(
            token_ids=await self._encode(request, served.tokenizer),
            max_model_len=served.engine_config.max_model_len,
        )

    @_checked_call
    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        tokenizer = self._ready().served.tokenizer
        with _RefusingValueErrors():
            # Counted before they are made integers of Python.
            LIMITS["num_token_ids"].check("number of token_ids", len(request.token_ids))
            token_ids = tuple(request.token_ids)
            check_token_ids(token_ids, tokenizer.vocab_size)
        decode = partial(tokenizer.decode, token_ids, is_on(request, "skip_control_tokens"))
        text = await self._threads.run(decode, len(token_ids), bounded="token ids")
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
        with _RefusingValueErrors():
            check_request_id(request.request_id)
        return pb.AbortResponse(was_live=serving.replicas.abort(request.request_id))

    # ------------------------------------------------------------------- from call to request

    def _ready(self) -> _Serving:
        if self._serving is None:
            raise NotServingError("the model is being loaded")
        return self._serving

    async def _admit(
        self, message: pb.GenerateRequest, request_id: str, served: ServedModel
    ) -> tuple[Request, TextOptions]:
        with _RefusingValueErrors():
            sampling = check_wishes(message, served)
        max_model_len = served.engine_config.max_model_len
        token_ids = await self._encode(message, served.tokenizer.limited(max_model_len))
        with _RefusingValueErrors():
            admitted = admitted_request(message, request_id, token_ids, sampling, served)
            return admitted, text_options(message.sampling, served.default_ending)

    async def _encode(
        self, message: pb.GenerateRequest | pb.TokenizeRequest, tokenizer: Tokenizer
    ) -> Sequence[int]:
        with _RefusingValueErrors():
            encode, num_characters = prompt_encoder(message, tokenizer)
            return await self._threads.run(encode, num_characters, bounded="characters of prompts")

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
                started = await self._threads.run(
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
