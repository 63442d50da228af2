"""The formats of a converted folder's matrices, as its description says them."""

from collections.abc import Mapping
from typing import Any

from checkpoints.checkpoint import Quantization
from checkpoints.converted.dataclass_json import from_json, to_json
from jaxinfer.config import STORED
from jaxinfer.weights import Format, kinds_of_formats, parse_format

MAX_PATH = 8


def quantization_to_json(quantization: Quantization) -> dict[str, Any]:
    """Returns an object with ``name`` and ``formats``."""
    formats = [
        {"path": list(path), "format": {"kind": type(form).__name__, **to_json(form)}}
        for path, form in quantization.formats
    ]
    return {"name": quantization.name, "formats": formats}


def quantization_from_json(value: object) -> Quantization:
    """Reads what ``quantization_to_json`` wrote. Raises ``ValueError`` naming what cannot be."""
    if not isinstance(value, dict):
        raise ValueError(f"quantization must be an object, got {value!r:.40}")
    name, formats = value.get("name"), value.get("formats")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"quantization.name must be text, got {name!r:.40}")
    if not isinstance(formats, list) or bool(formats) != (name == STORED):
        raise ValueError(
            f"quantization.formats must be a list, of one or more for {STORED!r} alone"
        )
    if name not in (None, STORED):
        parse_format(name)
    return Quantization(name, tuple(_read_entry(entry) for entry in formats))


def _read_entry(entry: object) -> tuple[tuple[str | int, ...], Format]:
    path = entry.get("path") if isinstance(entry, dict) else None
    is_path = isinstance(path, list) and all(type(key) in (str, int) for key in path)
    if not isinstance(entry, Mapping) or not is_path or len(path or ()) > MAX_PATH:
        raise ValueError(f"quantization.formats: an entry needs a path, got {entry!r:.80}")
    form = entry.get("format")
    kinds = kinds_of_formats()
    fields = dict(form) if isinstance(form, Mapping) else {}
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"quantization.formats: kind must be one of {', '.join(kinds)}")
    return tuple(path or ()), from_json(kinds[kind], fields, "format")
