"""A conversation as it is put into a chat template, its limits, and the JSON in it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from jaxinfer.request import Limit

# Bounds on what a chat may have besides messages, whose limits are the engine's.
CHAT_LIMITS: Mapping[str, Limit] = {
    "name_characters": Limit(1, 64),
    "num_template_arguments": Limit(0, 32),
    "template_argument_characters": Limit(1, 64),  # of the name; values count as prompt
    "num_tools": Limit(0, 256),  # and calls of one message; their characters count as prompt
}


class ChatInputs(NamedTuple):
    """The arguments of ``Tokenizer.encode_chat``."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    template_arguments: dict[str, str | bool]
    tools: list[dict[str, Any]]


def json_objects(path: str, texts: Iterable[str]) -> list[dict[str, Any]]:
    """Parses texts. Raises ``ValueError`` naming the item of ``path`` that is no JSON object."""
    objects = []
    for i, text in enumerate(texts):
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}[{i}] is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}[{i}] must be a JSON object, got {text!r:.80}")
        objects.append(value)
    return objects


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
