"""Frozen dataclasses as JSON objects and back; what is read is checked field by field."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, get_args, get_origin

# No size of a model is beyond it, and no product of two overflows.
MAX_INTEGER = 1 << 31


def to_json(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, tuples as lists."""
    return dataclasses.asdict(value)


def from_json[T](kind: type[T], value: object, name: str) -> T:
    """A dataclass of its fields.

    Raises ``ValueError`` naming the field that is missing, unknown or of another type; the
    dataclass may raise its own.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {value!r:.40}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    for key in value:
        if key not in fields:
            raise ValueError(f"{name} has no field {key!r:.40}")
    for field in fields.values():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name not in value and not optional:
            raise ValueError(f"{name}.{field.name} is missing")
    return kind(**{key: _read(hints[key], item, f"{name}.{key}") for key, item in value.items()})


def _read(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _read(hint, value, name)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(arguments)}, got {value!r:.40}")
        return value
    if origin is tuple:
        return _read_tuple(arguments, value, name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, name)
    return _read_scalar(hint, value, name)


def _read_tuple(arguments: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {value!r:.40}")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ValueError(f"{name} must be {len(arguments)} values, got {len(value)}")
    return tuple(_read(hint, item, name) for hint, item in zip(arguments, value, strict=True))


def _read_scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is float and type(value) is int:
        value = float(value) if abs(value) <= MAX_INTEGER else value
    if type(value) is not hint:
        raise ValueError(f"{name} must be of type {hint.__name__}, got {value!r:.40}")
    if hint is int and abs(value) > MAX_INTEGER and not name.endswith(".seed"):
        raise ValueError(f"{name} must be at most {MAX_INTEGER}, got {value!r:.40}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
