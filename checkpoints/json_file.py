"""JSON files that somebody else made: an object, read within bounds."""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

# Far above what such files have; a tokenizer.json has 7.
MAX_DEPTH = 100
MAX_DIGITS = 40  # of a whole number: those of 310 and more are no float


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a file.

    Raises ``ValueError`` naming the file: missing, no regular file, larger than ``max_bytes``, not
    JSON, no object, a key twice in one object, NaN, infinity or an endless whole number, nested
    too deeply.
    """
    text = read_text(path, max_bytes)
    try:
        value = json.loads(
            text, object_pairs_hook=_once, parse_int=_integer, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, is a {type(value).__name__}")
    # The parser stands more than what writes or shows a value, and not always the same.
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"{path}: nested too deeply")
    return value


def read_text(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of a file. Raises ``ValueError`` as ``read_json`` does."""
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            # No more than is there: a read takes memory for all that it is asked for.
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, max_bytes) + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ValueError(f"{path}: larger than the limit of {max_bytes} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error


def _is_deeper(value: object, limit: int) -> bool:
    """Tells if lists and objects are within each other more than ``limit`` times."""
    level = [value]
    for _ in range(limit):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"key {twice!r:.80} occurs twice")
    return fields


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, more than the limit of {MAX_DIGITS}")
    return int(digits)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
