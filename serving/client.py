"""The typed client: what chat, benchmarks, tests and users call. Imports neither JAX nor a model.

with Client("127.0.0.1:50051") as client:
    for event in client.generate("Once upon a time", max_tokens=64):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypedDict, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.proto.jaxinfer.v1 import inference_pb2_grpc

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A server that is just starting is found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


# Text, token ids, or a conversation.
type Prompt = str | Sequence[int] | Sequence[Message]


class GenerateOptions(TypedDict, total=False):
    """Keywords of ``generate`` and ``complete``. What is left out is the server's default.

    ``timeout`` is the call's deadline in seconds; the others are fields of the .proto.
    """

    request_id: str
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool
    stream: bool
    add_special_tokens: bool
    timeout: float


@dataclass(frozen=True)
class Started:
    """The first event. ``seeds`` has one entry a choice; greedy sampling uses none."""

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    seeds: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Delta:
    """New text and tokens of one choice."""

    choice: int
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Usage:
    """Counts of one choice, in tokens."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_preemptions: int


@dataclass(frozen=True)
class Timings:
    """Seconds since the server received the request; None is not known."""

    queue_seconds: float | None
    time_to_first_token_seconds: float | None
    total_seconds: float | None


@dataclass(frozen=True)
class Finished:
    """The last event of a choice. ``reason`` is "stop", "length" or "abort"."""

    choice: int
    reason: str
    stop_token_id: int | None
    usage: Usage
    timings: Timings


type Event = Started | Delta | Finished


@dataclass(frozen=True)
class Completion:
    """All events of a request with one choice, put together."""

    text: str
    token_ids: tuple[int, ...]
    started: Started
    finished: Finished


class ServerError(Exception):
    """A call failed. ``code`` is the gRPC status by name, such as "INVALID_ARGUMENT"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Client:
    """Calls a server at ``target`` ("host:port"). May be shared between threads."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)  # has no types

    def generate(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> Generator[Event, None, None]:
        """Events as they come; leaving the loop early, or ``close()``, cancels the request."""
        call = self._stub.Generate(_request(prompt, options), timeout=options.get("timeout"))
        try:
            with _errors():
                for response in call:
                    yield _event(response)
        finally:
            call.cancel()

    def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole output at once."""
        return _completion(list(self.generate(prompt, **options)))

    def tokenize(
        self, prompt: str | Sequence[Message], *, add_special_tokens: bool | None = None
    ) -> tuple[int, ...]:
        with _errors():
            response = self._stub.Tokenize(_tokenize_request(prompt, add_special_tokens))
        return tuple(response.token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_control_tokens: bool = True) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_control_tokens=skip_control_tokens)
        with _errors():
            return self._stub.Detokenize(request).text

    def model_info(self) -> pb.GetModelInfoResponse:
        with _errors():
            return self._stub.GetModelInfo(pb.GetModelInfoRequest())

    def load(self) -> pb.GetLoadResponse:
        with _errors():
            return self._stub.GetLoad(pb.GetLoadRequest())

    def abort(self, request_id: str) -> bool:
        """Ends a live request, also another client's; whether there was one."""
        with _errors():
            return self._stub.Abort(pb.AbortRequest(request_id=request_id)).was_live

    def wait_until_serving(self, timeout: float) -> None:
        """Returns when the model is loaded; raises ``TimeoutError`` after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                reply = self._health.Check(_HEALTH_REQUEST, timeout=left, wait_for_ready=True)
            except grpc.RpcError as error:
                if not _may_come_up(error):
                    raise _server_error(error) from None
            else:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(min(_POLL_SECONDS, left))
        raise TimeoutError(f"the server did not serve within {timeout} s")

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio. Construct it inside the loop that uses it."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)  # has no types

    async def generate(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event, None]:
        """Events as they come; ``aclose()``, or cancelling the task, cancels the request."""
        call = self._stub.Generate(_request(prompt, options), timeout=options.get("timeout"))
        try:
            with _errors():
                async for response in call:
                    yield _event(response)
        finally:
            call.cancel()

    async def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole output at once."""
        return _completion([event async for event in self.generate(prompt, **options)])

    async def tokenize(
        self, prompt: str | Sequence[Message], *, add_special_tokens: bool | None = None
    ) -> tuple[int, ...]:
        with _errors():
            response = await self._stub.Tokenize(_tokenize_request(prompt, add_special_tokens))
        return tuple(response.token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_control_tokens: bool = True
    ) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_control_tokens=skip_control_tokens)
        with _errors():
            return (await self._stub.Detokenize(request)).text

    async def model_info(self) -> pb.GetModelInfoResponse:
        with _errors():
            return await self._stub.GetModelInfo(pb.GetModelInfoRequest())

    async def load(self) -> pb.GetLoadResponse:
        with _errors():
            return await self._stub.GetLoad(pb.GetLoadRequest())

    async def abort(self, request_id: str) -> bool:
        """Ends a live request, also another client's; whether there was one."""
        with _errors():
            return (await self._stub.Abort(pb.AbortRequest(request_id=request_id))).was_live

    async def wait_until_serving(self, timeout: float) -> None:
        """Returns when the model is loaded; raises ``TimeoutError`` after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                reply = await self._health.Check(_HEALTH_REQUEST, timeout=left, wait_for_ready=True)
            except grpc.RpcError as error:
                if not _may_come_up(error):
                    raise _server_error(error) from None
            else:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(min(_POLL_SECONDS, left))
        raise TimeoutError(f"the server did not serve within {timeout} s")

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


_HEALTH_REQUEST = health_pb2.HealthCheckRequest(service=_SERVICE_NAME)


def _request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    for name, value in options.items():
        if name == "timeout" or value is None:
            continue
        target = (
            request.sampling if name in pb.SamplingParams.DESCRIPTOR.fields_by_name else request
        )
        setattr(target, name, value)
    return request


def _tokenize_request(
    prompt: str | Sequence[Message], add_special_tokens: bool | None
) -> pb.TokenizeRequest:
    request = pb.TokenizeRequest(add_special_tokens=add_special_tokens)
    _set_prompt(request, prompt)
    return request


def _set_prompt(request: pb.GenerateRequest | pb.TokenizeRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    messages = [item for item in prompt if isinstance(item, Message)]
    if messages:
        if len(messages) != len(prompt):
            raise ValueError("a prompt has either messages or token ids, not both")
        request.chat.messages.extend(
            pb.ChatMessage(role=message.role, content=message.content) for message in messages
        )
    elif isinstance(request, pb.GenerateRequest):
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(item for item in prompt if not isinstance(item, Message))
    else:
        raise ValueError("only a text or messages can be tokenized")


def _event(response: pb.GenerateResponse) -> Event:
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                request_id=started.request_id,
                num_prompt_tokens=started.num_prompt_tokens,
                num_cached_tokens=started.num_cached_tokens,
                seeds=tuple(started.seeds),
                max_tokens=started.max_tokens,
            )
        case "delta":
            delta = response.delta
            return Delta(delta.choice, delta.text, tuple(delta.token_ids))
        case "finished":
            return _finished(response.finished)
        case kind:
            raise ValueError(f"this client does not know the event {kind!r}")


def _finished(finished: pb.Finished) -> Finished:
    usage, timings = finished.usage, finished.timings
    return Finished(
        choice=finished.choice,
        reason=pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        usage=Usage(
            **{field.name: getattr(usage, field.name) for field in usage.DESCRIPTOR.fields}
        ),
        timings=Timings(
            **{
                field.name: getattr(timings, field.name) if timings.HasField(field.name) else None
                for field in timings.DESCRIPTOR.fields
            }
        ),
    )


def _completion(events: list[Event]) -> Completion:
    deltas = [event for event in events if isinstance(event, Delta)]
    (started,) = (event for event in events if isinstance(event, Started))
    (finished,) = (event for event in events if isinstance(event, Finished))
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        started=started,
        finished=finished,
    )


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _server_error(error) from None


def _may_come_up(error: grpc.RpcError) -> bool:
    return isinstance(error, grpc.Call) and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )


def _server_error(error: grpc.RpcError) -> ServerError:
    # Both kinds of RpcError have these; the base class declares neither.
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if code is None or details is None:
        return ServerError("UNKNOWN", str(error))
    return ServerError(code().name, details() or "")
