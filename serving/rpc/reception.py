"""Receiving a call's message: read, counted, decoded; what is no message is refused.

gRPC would read and decode whatever comes before our code is asked, and answers what it cannot
decode with UNKNOWN and lines in the log. So methods that take one message are registered as taking
a stream of them, which is the same on the wire, and the first is read here. Knows no model.
"""

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from serving.loop import RequestRefusedError, TooManyRequestsError
from serving.proto.jaxinfer.v1 import inference_pb2
from serving.rpc.arrivals import Arrivals
from serving.rpc.statuses import STATUS_CODES, abort, status_of
from serving.rpc.wire import SMALL_MESSAGE_BYTES, check_fields

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
_GENERATE = f"/{_INFERENCE.full_name}/Generate"
# The request of each of our methods. Those of others (health, reflection) are small.
_REQUESTS: dict[str, Any] = {
    f"/{_INFERENCE.full_name}/{method.name}": method.input_type for method in _INFERENCE.methods
}

type _Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class ReceptionInterceptor(grpc.aio.ServerInterceptor):
    """Reads the message of each call that brings one, and hands it to the method decoded.

    Calls of our service are counted apart from all others, so that health is told however many
    there are. ``check_generate`` raises whatever a Generate would be refused with now: before its
    message is read. A message is let go of before its refusal is sent: many large ones that are
    refused at once take no more memory than one.
    """

    def __init__(
        self, check_generate: Callable[[], None], ours: Arrivals, others: Arrivals
    ) -> None:
        self._check_generate = check_generate
        self._ours = ours
        self._others = others

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        # None is a method that nobody knows.
        if handler is None:
            return handler
        method = handler_call_details.method
        arrivals = self._ours if method in _REQUESTS else self._others
        if handler.request_streaming:
            return _counted(handler, arrivals)
        behaviour = _received(
            partial(_decoded, method, handler.request_deserializer),
            handler.unary_stream or handler.unary_unary,
            arrivals,
            self._check_generate if method == _GENERATE else lambda: None,
        )
        register = grpc.stream_unary_rpc_method_handler
        if handler.response_streaming:
            register = grpc.stream_stream_rpc_method_handler
        return register(behaviour, response_serializer=handler.response_serializer)


def _received(
    decode: Callable[[bytes], Any],
    answer: _Behaviour,
    arrivals: Arrivals,
    check: Callable[[], None],
) -> _Behaviour:
    """The behaviour that receives a message and answers it."""

    async def receive_and_answer(_: Any, context: grpc.aio.ServicerContext) -> Any:
        with ExitStack() as call:
            try:
                check()
                call.enter_context(arrivals.counted())
                answering = answer(decode(await arrivals.message(context)), context)
            except tuple(STATUS_CODES) as error:
                status = status_of(error, "receiving")
            else:
                return await answering
        return await abort(context, status)

    return receive_and_answer


def _counted(handler: Any, arrivals: Arrivals) -> Any:
    """The handler of a method whose requests are a stream, such as reflection's, calls counted."""
    assert handler.response_streaming, "no service has a stream of requests and one answer"

    async def count_and_answer(requests: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            with arrivals.counted():
                async for response in handler.stream_stream(requests, context):
                    yield response
                return
        except TooManyRequestsError as error:
            status = status_of(error, "receiving")
        await abort(context, status)

    return grpc.stream_stream_rpc_method_handler(
        count_and_answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _decoded(method: str, decode: Callable[[bytes], Any], data: bytes) -> Any:
    """The message. Raises ``RequestRefusedError`` for one that is none, or has too much in it."""
    try:
        if (descriptor := _REQUESTS.get(method)) is not None:
            check_fields(data, descriptor)
        elif len(data) > SMALL_MESSAGE_BYTES:
            raise ValueError(
                f"the request has {len(data)} bytes, the limit of {method} is {SMALL_MESSAGE_BYTES}"
            )
        return decode(data)
    except DecodeError:
        raise RequestRefusedError("the request is no message of this method") from None
    except ValueError as error:
        raise RequestRefusedError(str(error)) from None
