"""A text that a program is given to read whole."""

from pathlib import Path

MAX_TEXT_BYTES = 256 << 20


def read_text(path: str) -> str:
    """The UTF-8 text of a file. Raises ``ValueError`` naming what is wrong with it."""
    size = Path(path).stat().st_size
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {MAX_TEXT_BYTES}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
