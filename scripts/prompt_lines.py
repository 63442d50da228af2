"""JSON lines of prompts, as ``generate.py --input`` takes them. Knows no model, imports no JAX."""

import json
from collections.abc import Iterable
from typing import Any

from jaxinfer.request import LIMITS

INPUT_KINDS = ("prompt", "messages", "token_ids")
MAX_LINE_CHARACTERS = 16 << 20


def parse_lines(file: Iterable[str]) -> list[dict[str, Any]]:
    """JSON objects with exactly one of prompt, messages and token_ids. Raises ``ValueError``."""
    inputs = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_CHARACTERS:
            raise ValueError(f"line {number} has more than {MAX_LINE_CHARACTERS} characters")
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in INPUT_KINDS:
            raise ValueError(
                f"line {number} must be an object with exactly one of {', '.join(INPUT_KINDS)}"
            )
        check_line(number, value)
        inputs.append(value)
    if not inputs:
        raise ValueError("no prompts: the input has no lines")
    return inputs


def check_line(number: int, value: dict[str, Any]) -> None:
    """Raises ``ValueError`` naming the line when a prompt is not of its kind."""
    kind, content = next(iter(value.items()))
    if kind == "prompt" and not isinstance(content, str):
        raise ValueError(f"line {number}: prompt must be a string")
    if kind == "token_ids" and not (
        isinstance(content, list) and all(type(token) is int for token in content)
    ):
        raise ValueError(f"line {number}: token_ids must be a list of whole numbers")
    if kind == "token_ids" and not content:
        raise ValueError(f"line {number}: token_ids is empty; at least 1 is needed")
    if kind == "messages":
        fits = isinstance(content, list) and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(part, str) for part in message.values())
            for message in content
        )
        if not fits:
            raise ValueError(f"line {number}: messages must be objects with role and content")
        LIMITS["messages"].check(f"line {number}: number of messages", len(content))
