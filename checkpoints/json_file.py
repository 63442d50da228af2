"""JSON files that somebody else made: an object, read within bounds."""

import json
from pathlib import Path
from typing import Any, NoReturn


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a file.

    Raises ``ValueError`` naming the file: missing, no regular file, larger than ``max_bytes``, not
    JSON, no object, a key twice in one object, NaN or infinity, nested too deeply.
    """
    text = read_text(path, max_bytes)
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, is a {type(value).__name__}")
    return value


def read_text(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of a file. Raises ``ValueError`` as ``read_json`` does."""
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ValueError(f"{path}: larger than the limit of {max_bytes} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r:.80} occurs twice")
    return fields


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
