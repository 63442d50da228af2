"""A conversation on the wire as what a chat template is given."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.rpc.validate import is_on


class ChatInputs(NamedTuple):
    """The arguments of ``Tokenizer.encode_chat``."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    template_arguments: dict[str, str | bool]
    tools: list[dict[str, Any]]


def chat_inputs(chat: pb.Chat) -> ChatInputs:
    """Reads a chat. Raises ``ValueError`` naming the field that is no JSON object."""
    booleans = {"true": True, "false": False}
    return ChatInputs(
        messages=[
            _message(f"chat.messages[{i}]", message) for i, message in enumerate(chat.messages)
        ],
        add_generation_prompt=(
            is_on(chat, "add_generation_prompt") and not chat.continue_final_message
        ),
        continue_final_message=chat.continue_final_message,
        template_arguments={
            name: booleans.get(value, value) for name, value in chat.template_arguments.items()
        },
        tools=_objects("chat.tools", chat.tools),
    )


def _message(path: str, message: pb.ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.HasField("name"):
        fields["name"] = message.name
    if message.HasField("tool_call_id"):
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = _objects(f"{path}.tool_calls", message.tool_calls)
    return fields


def _objects(path: str, texts: Iterable[str]) -> list[dict[str, Any]]:
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
