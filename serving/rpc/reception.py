"""Receiving a call's message: read, counted, decoded; what is no message is refused.

gRPC would read and decode whatever comes before our code is asked, and answers what it cannot
decode with UNKNOWN and lines in the log. So methods that take one message are registered as taking
a stream of them, which is the same on the wire, and the first is read here. Knows no model.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from serving.loop import RequestRefusedError
from serving.proto.jaxinfer.v1 import inference_pb2
from serving.rpc.statuses import abort, status_of
from serving.rpc.wire import SMALL_MESSAGE_BYTES, check_fields

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
# The request of each of our methods. Those of others (health, reflection) are small.
_REQUESTS: dict[str, Any] = {
    f"/{_INFERENCE.full_name}/{method.name}": method.input_type for method in _INFERENCE.methods
}

type _Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class ReceptionInterceptor(grpc.aio.ServerInterceptor):
    """Reads the message of each call that brings one, and hands it to the method decoded.

    A message is let go of before its refusal is sent: many large ones that are refused at once take
    no more memory than one.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        # None is a method that nobody knows.
        if handler is None or handler.request_streaming:
            return handler
        method, decode = handler_call_details.method, handler.request_deserializer
        behaviour = _received(method, decode, handler.unary_stream or handler.unary_unary)
        register = grpc.stream_unary_rpc_method_handler
        if handler.response_streaming:
            register = grpc.stream_stream_rpc_method_handler
        return register(behaviour, response_serializer=handler.response_serializer)


def _received(method: str, decode: Callable[[bytes], Any], answer: _Behaviour) -> _Behaviour:
    async def receive_and_answer(_: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            answering = answer(_decoded(await _read(context), method, decode), context)
        except RequestRefusedError as error:
            status = status_of(error, method)
        else:
            return await answering
        return await abort(context, status)

    return receive_and_answer


async def _read(context: Any) -> bytes:
    data = await context.read()
    if not isinstance(data, bytes):  # grpc.aio.EOF
        raise RequestRefusedError("the call has no message")
    return data


def _decoded(data: bytes, method: str, decode: Callable[[bytes], Any]) -> Any:
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
