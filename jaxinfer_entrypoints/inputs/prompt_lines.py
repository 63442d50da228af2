"""JSON lines of prompts, as ``generate.py --input`` takes them. Knows no model, imports no JAX."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxinfer.request import LIMITS

INPUT_KINDS = ("prompt", "messages", "token_ids")
MAX_LINE_CHARACTERS = 16 << 20


class PromptLine(NamedTuple):
    """A prompt: one of ``INPUT_KINDS`` and its content, and the place it stands, for errors."""

    place: str
    kind: str
    content: Any


def parse_lines(file: Iterable[str], name: str) -> list[PromptLine]:
    """The prompts of a file: JSON objects with exactly one of prompt, messages and token_ids.

    Raises ``ValueError`` naming the file, ``name``, and the line.
    """
    inputs: list[PromptLine] = []
    try:
        for number, line in enumerate(file, start=1):
            if line.strip():
                inputs.append(_parse_line(f"{name}, line {number}", line))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error
    if not inputs:
        raise ValueError(f"{name} has no prompts: all lines are empty")
    return inputs


def _parse_line(place: str, line: str) -> PromptLine:
    if len(line) > MAX_LINE_CHARACTERS:
        raise ValueError(f"{place} has more than {MAX_LINE_CHARACTERS} characters")
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in INPUT_KINDS:
        raise ValueError(f"{place} must be an object with exactly one of {', '.join(INPUT_KINDS)}")
    (pair,) = value.items()
    parsed = PromptLine(place, *pair)
    _check_line(parsed)
    return parsed


def _check_line(line: PromptLine) -> None:
    """Raises ``ValueError`` naming the line when a prompt is not of its kind."""
    place, kind, content = line
    texts = []
    if kind == "prompt":
        if not isinstance(content, str):
            raise ValueError(f"{place}: prompt must be a string")
        texts = [content]
    elif kind == "token_ids":
        if not isinstance(content, list) or not all(type(token) is int for token in content):
            raise ValueError(f"{place}: token_ids must be a list of whole numbers")
        if not content:
            raise ValueError(f"{place}: token_ids is empty; at least 1 is needed")
    else:
        fits = isinstance(content, list) and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(part, str) for part in message.values())
            for message in content
        )
        if not fits:
            raise ValueError(f"{place}: messages must be objects with role and content")
        LIMITS["messages"].check(f"{place}: number of messages", len(content))
        texts = [part for message in content for part in message.values()]
    for text in texts:
        lone = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
        if lone is not None:
            raise ValueError(f"{place}: {kind} has half a character, the surrogate {lone!a}")
