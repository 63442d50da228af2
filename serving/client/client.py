"""The typed client: what chat, benchmarks, tests and users call. Imports neither JAX nor a model.

with Client() as client:
    for event in client.generate("Once upon a time", max_tokens=64):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.address import DEFAULT_HOST, DEFAULT_PORT, check_address
from serving.client.events import (
    Completion,
    Event,
    completions_of,
    event_of,
)
from serving.client.options import GenerateOptions, Message, Prompt, PromptOptions
from serving.client.requests import (
    abort_request,
    check_one_choice,
    check_timeout,
    detokenize_request,
    generate_request,
    tokenize_request,
)
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
DEFAULT_TARGET = f"{DEFAULT_HOST}:{DEFAULT_PORT}"
_SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_POLL_SECONDS = 0.1


class ServerError(Exception):
    """A call failed. ``code`` is the gRPC status by name, such as "INVALID_ARGUMENT"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Client:
    """Calls a server at ``target``, HOST:PORT. May be shared between threads.

    Raises ``TypeError`` or ``ValueError`` naming the argument that no call can be made with.
    """

    def __init__(self, target: str = DEFAULT_TARGET) -> None:
        self._channel = grpc.insecure_channel(
            check_address("target", target), options=CHANNEL_OPTIONS
        )
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)  # has no types

    def generate(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> Generator[Event, None, None]:
        """Events as they come; leaving the loop early, or ``close()``, cancels the request."""
        call = self._stub.Generate(
            generate_request(prompt, options), timeout=options.get("timeout")
        )
        try:
            with _errors():
                for response in call:
                    yield event_of(response)
        finally:
            call.cancel()

    def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole output at once."""
        check_one_choice(options)
        return self.complete_choices(prompt, **options)[0]

    def complete_choices(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> tuple[Completion, ...]:
        """The whole outputs of all ``n`` choices at once."""
        return completions_of(self.generate(prompt, **options))

    def tokenize(
        self, prompt: str | Sequence[Message], **options: Unpack[PromptOptions]
    ) -> tuple[int, ...]:
        with _errors():
            response = self._stub.Tokenize(tokenize_request(prompt, options))
        return tuple(response.token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_control_tokens: bool = True) -> str:
        request = detokenize_request(token_ids, skip_control_tokens=skip_control_tokens)
        with _errors():
            return self._stub.Detokenize(request).text

    def model_info(self, *, timeout: float | None = None) -> pb.GetModelInfoResponse:
        if timeout is not None:
            check_timeout(timeout)
        with _errors():
            return self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout)

    def load(self) -> pb.GetLoadResponse:
        with _errors():
            return self._stub.GetLoad(pb.GetLoadRequest())

    def abort(self, request_id: str) -> bool:
        """Ends a live request, also another client's; whether there was one."""
        with _errors():
            return self._stub.Abort(abort_request(request_id)).was_live

    def is_serving(self, *, timeout: float) -> bool:
        """Tells whether the model is loaded. ``ServerError``: nobody answers within ``timeout``."""
        check_timeout(timeout)
        with _errors():
            reply = self._health.Check(_HEALTH_REQUEST, timeout=timeout)
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    def wait_until_serving(self, timeout: float) -> None:
        """Returns when the model is loaded; raises ``TimeoutError`` after ``timeout`` seconds."""
        for left in _polls(timeout):
            with _forgiving_absence():
                reply = self._health.Check(_HEALTH_REQUEST, timeout=left, wait_for_ready=True)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(min(_POLL_SECONDS, left))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio. Construct it inside the loop that uses it."""

    def __init__(self, target: str = DEFAULT_TARGET) -> None:
        self._channel = grpc.aio.insecure_channel(
            check_address("target", target), options=CHANNEL_OPTIONS
        )
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)  # has no types

    async def generate(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event, None]:
        """Events as they come; ``aclose()``, or cancelling the task, cancels the request."""
        call = self._stub.Generate(
            generate_request(prompt, options), timeout=options.get("timeout")
        )
        try:
            with _errors():
                async for response in call:
                    yield event_of(response)
        finally:
            call.cancel()

    async def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole output at once."""
        check_one_choice(options)
        return (await self.complete_choices(prompt, **options))[0]

    async def complete_choices(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> tuple[Completion, ...]:
        """The whole outputs of all ``n`` choices at once."""
        return completions_of([event async for event in self.generate(prompt, **options)])

    async def tokenize(
        self, prompt: str | Sequence[Message], **options: Unpack[PromptOptions]
    ) -> tuple[int, ...]:
        with _errors():
            response = await self._stub.Tokenize(tokenize_request(prompt, options))
        return tuple(response.token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_control_tokens: bool = True
    ) -> str:
        request = detokenize_request(token_ids, skip_control_tokens=skip_control_tokens)
        with _errors():
            return (await self._stub.Detokenize(request)).text

    async def model_info(self, *, timeout: float | None = None) -> pb.GetModelInfoResponse:
        if timeout is not None:
            check_timeout(timeout)
        with _errors():
            return await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout)

    async def load(self) -> pb.GetLoadResponse:
        with _errors():
            return await self._stub.GetLoad(pb.GetLoadRequest())

    async def abort(self, request_id: str) -> bool:
        """Ends a live request, also another client's; whether there was one."""
        with _errors():
            return (await self._stub.Abort(abort_request(request_id))).was_live

    async def is_serving(self, *, timeout: float) -> bool:
        """Tells whether the model is loaded. ``ServerError``: nobody answers within ``timeout``."""
        check_timeout(timeout)
        with _errors():
            reply = await self._health.Check(_HEALTH_REQUEST, timeout=timeout)
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    async def wait_until_serving(self, timeout: float) -> None:
        """Returns when the model is loaded; raises ``TimeoutError`` after ``timeout`` seconds."""
        for left in _polls(timeout):
            with _forgiving_absence():
                reply = await self._health.Check(_HEALTH_REQUEST, timeout=left, wait_for_ready=True)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(min(_POLL_SECONDS, left))

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


_HEALTH_REQUEST = health_pb2.HealthCheckRequest(service=_SERVICE_NAME)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _server_error(error) from None


def _polls(timeout: float) -> Iterator[float]:
    """The seconds that are left, as long as some are; then raises ``TimeoutError``."""
    check_timeout(timeout)
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        yield left
    raise TimeoutError(f"the server did not serve within {timeout} s")


@contextmanager
def _forgiving_absence() -> Iterator[None]:
    """Around a call to a server that may still come up."""
    try:
        yield
    except grpc.RpcError as error:
        absent = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        if not isinstance(error, grpc.Call) or error.code() not in absent:
            raise _server_error(error) from None


def _server_error(error: grpc.RpcError) -> ServerError:
    # Both kinds of RpcError have these; the base class declares neither.
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if code is None or details is None:
        return ServerError("UNKNOWN", str(error))
    return ServerError(code().name, details() or "")
