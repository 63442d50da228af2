"""Bytes of a message that are counted before they are decoded.

Two bytes on the wire can make a message of a hundred in memory: a request of a few MiB of them
would take half a GiB, and a second, before a limit on its fields could be looked at.
"""

from functools import cache
from typing import Any

# A conversation of as many messages as may be, with dozens of calls each, has fewer.
MAX_FIELDS = 1 << 15
# Whatever is in a message of so few bytes takes little.
SMALL_MESSAGE_BYTES = 2 * MAX_FIELDS

_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5


def check_fields(data: bytes, descriptor: Any) -> None:
    """Raises ``ValueError`` where ``data`` has more than ``MAX_FIELDS`` fields in all.

    Bytes that are no message pass: whoever decodes them will say so. Time is linear in the fields,
    of which it looks at so many at most.
    """
    if len(data) <= SMALL_MESSAGE_BYTES:
        return
    num_fields = 0
    pending = [(0, len(data), descriptor)]
    try:
        while pending:
            at, end, kind = pending.pop()
            messages = _message_fields(kind)
            while at < end:
                num_fields += 1
                if num_fields > MAX_FIELDS:
                    raise ValueError(
                        f"the request of {len(data)} bytes has more fields than the limit of "
                        f"{MAX_FIELDS}, those of its messages included"
                    )
                tag, at = _varint(data, at)
                wire_type = tag & 7
                if wire_type == _VARINT:
                    _, at = _varint(data, at)
                elif wire_type == _LENGTH:
                    length, at = _varint(data, at)
                    if length > end - at:
                        return
                    if length and (inner := messages.get(tag >> 3)) is not None:
                        pending.append((at, at + length, inner))
                    at += length
                elif wire_type in (_FIXED_32, _FIXED_64):
                    at += 4 if wire_type == _FIXED_32 else 8
                # The rest begins or ends a group: what is in it is counted as if it were ours.
    except IndexError:
        return


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError


@cache
def _message_fields(descriptor: Any) -> dict[int, Any]:
    """The fields that hold messages, by number."""
    return {
        field.number: field.message_type
        for field in descriptor.fields
        if field.message_type is not None
    }
