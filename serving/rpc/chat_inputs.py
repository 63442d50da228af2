"""A conversation on the wire, as arguments of a chat template."""

from typing import Any

from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.rpc.validate import is_on
from serving.text.conversation import ChatInputs, json_objects


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
        tools=json_objects("chat.tools", chat.tools),
    )


def _message(path: str, message: pb.ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.HasField("name"):
        fields["name"] = message.name
    if message.HasField("tool_call_id"):
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = json_objects(f"{path}.tool_calls", message.tool_calls)
    return fields
