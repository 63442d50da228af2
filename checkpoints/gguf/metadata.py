"""Typed access to the metadata of a GGUF file."""

import math
from collections.abc import Mapping

from checkpoints.gguf.file import MetadataValue


def metadata_value[T: (int, float, str, bool)](
    metadata: Mapping[str, MetadataValue], key: str, kind: type[T], default: T | None = None
) -> T:
    """A value of the wanted type, ``default`` when it is absent.

    Raises ``ValueError`` naming the key: missing, of another type, not finite.
    """
    value = metadata.get(key, default)
    if value is None:
        raise ValueError(f"metadata key {key!r} is missing")
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or type(value) is not kind:
        raise ValueError(
            f"metadata key {key!r} must be of type {kind.__name__}, got {type(value).__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metadata key {key!r} must be finite, got {value}")
    return value
