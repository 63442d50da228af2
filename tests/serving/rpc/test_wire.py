"""Messages are counted before they are decoded."""

import tracemalloc

import pytest
from google.protobuf.message import DecodeError

from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.rpc.wire import MAX_FIELDS, SMALL_MESSAGE_BYTES, check_fields
from tests.serving.rpc.test_refusals import largest_request

REQUEST = pb.GenerateRequest.DESCRIPTOR


def field(number: int, data: bytes) -> bytes:
    """A field of bytes on the wire."""
    tag, length, prefix = number << 3 | 2, len(data), b""
    for value in (tag, length):
        while value > 127:
            prefix += bytes((value & 127 | 128,))
            value >>= 7
        prefix += bytes((value,))
    return prefix + data


HOSTILE = {
    "empty messages": field(4, field(1, b"") * (4 << 20)),
    "empty calls": field(4, field(1, field(4, b"") * (4 << 20))),
    "empty map entries": field(4, field(4, b"") * (4 << 20)),
    "the same field again": b"\x08\x00" * (4 << 20),
    "unknown fields": b"\xf8\x07\x00" * (2 << 20),
    "groups": b"\xfb\x07\xfc\x07" * (2 << 20),
    "many chats": field(4, b"") * (4 << 20),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_many_fields_are_refused_before_they_take_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{len(data)} bytes has more fields .* {MAX_FIELDS}"):
            check_fields(data, REQUEST)
        assert tracemalloc.get_traced_memory()[1] < len(data) // 2
    finally:
        tracemalloc.stop()


def test_the_largest_request_passes() -> None:
    check_fields(largest_request().SerializeToString(), REQUEST)
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(1 << 20)))
    check_fields(ids.SerializeToString(), REQUEST)
    check_fields(pb.DetokenizeRequest(token_ids=range(1 << 20)).SerializeToString(), REQUEST)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * (SMALL_MESSAGE_BYTES + 1),
        b"\x22\xff\xff\xff\x7f" + bytes(SMALL_MESSAGE_BYTES),
        field(2, b"x" * SMALL_MESSAGE_BYTES)[:-1],
        field(2, b"x" * SMALL_MESSAGE_BYTES) + b"\x09",
        field(2, b"x" * SMALL_MESSAGE_BYTES) + b"\x0f",
    ],
)
def test_no_message_is_left_to_the_decoder(data: bytes) -> None:
    check_fields(data, REQUEST)
    with pytest.raises(DecodeError):
        pb.GenerateRequest.FromString(data)


def test_small_messages_are_not_looked_at() -> None:
    check_fields(b"\x22\x00" * (SMALL_MESSAGE_BYTES // 2), REQUEST)
