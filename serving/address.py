"""The address that a server listens at, as everybody writes it. Imports no gRPC."""

import re

# Where a server listens, and clients look for one, unless they are told otherwise.
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 50051


def check_address(name: str, address: object) -> str:
    """``address`` itself, HOST:PORT, such as 127.0.0.1:50051, [::1]:50051 or localhost:50051.

    Raises ``TypeError`` or ``ValueError`` that calls it ``name``.
    """
    wanted = f"{name} must be HOST:PORT with a port between 1 and 65535"
    if not isinstance(address, str):
        raise TypeError(f"{wanted}, as a str, got {address!r:.80}")
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) <= 65535
    # gRPC would take a scheme or a path too, and a host that is none only fails in the first call.
    if not is_port or not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host):
        raise ValueError(f"{wanted}, got {address!r:.80}")
    return address
