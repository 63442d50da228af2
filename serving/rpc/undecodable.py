"""Requests that are no message: refused with INVALID_ARGUMENT, where gRPC says UNKNOWN and logs."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError


class UndecodableInterceptor(grpc.aio.ServerInterceptor):
    """Hands bytes that are no message to the methods below ``prefix`` as a ``DecodeError``.

    Those refuse it. They take one message, and answer with one or with a stream.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        # None is a method that nobody knows.
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        options = {
            "request_deserializer": _decoding_or_error(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(handler.unary_stream, **options)
        return grpc.unary_unary_rpc_method_handler(handler.unary_unary, **options)


def _decoding_or_error(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode_or_error(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return error

    return decode_or_error
