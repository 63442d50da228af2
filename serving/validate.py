"""From a hostile message to checked values: what is supported, and within which limits.

Knows the schema and ``jaxinfer.request.LIMITS``; neither tokenizes nor talks to a client.
Every function raises ``ValueError`` naming the field, the value and the limit.
"""

import secrets
from collections.abc import Mapping

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxinfer.request import LIMITS, SamplingParams
from serving.proto.jaxinfer.v1 import inference_pb2 as pb

# New tokens when a request does not say; the .proto promises it.
DEFAULT_MAX_TOKENS = 256

# The fields that are served. Whatever is not named here is refused when it is set, so a field
# that is new in the schema is refused until somebody builds it.
SUPPORTED_FIELDS: Mapping[str, frozenset[str]] = {
    "GenerateRequest": frozenset(
        ("request_id", "text", "token_ids", "chat", "sampling", "stream", "add_special_tokens")
    ),
    "SamplingParams": frozenset(
        ("temperature", "top_k", "top_p", "seed", "max_tokens", "ignore_eos")
    ),
    "TokenIds": frozenset(("ids",)),
    "Chat": frozenset(("messages",)),
    "ChatMessage": frozenset(("role", "content")),
    "TokenizeRequest": frozenset(("text", "chat", "add_special_tokens")),
    "DetokenizeRequest": frozenset(("token_ids", "skip_control_tokens")),
    "AbortRequest": frozenset(("request_id",)),
}

# Values that say the same as not setting the field: allowed where the field is not supported.
NEUTRAL_VALUES: Mapping[str, object] = {
    "GenerateRequest.priority": 0,
    "GenerateRequest.cache_salt": "",
    "GenerateRequest.model": "",
    "SamplingParams.min_p": 0.0,
    "SamplingParams.repetition_penalty": 1.0,
    "SamplingParams.presence_penalty": 0.0,
    "SamplingParams.frequency_penalty": 0.0,
    "SamplingParams.min_tokens": 0,
    "SamplingParams.include_stop_in_output": False,
    "SamplingParams.n": 1,
    "SamplingParams.skip_control_tokens": True,
    "Chat.add_generation_prompt": True,
    "Chat.continue_final_message": False,
}


def refuse_unsupported(message: Message, path: str = "") -> None:
    """Walks every field that is set and refuses, by its path, one that is not served.

    Fields that this schema does not know, sent by a newer client, are refused by their number.
    """
    name = message.DESCRIPTOR.name
    for unknown in UnknownFieldSet(message):
        raise ValueError(f"{name} has no field number {unknown.field_number} in this server")
    supported = SUPPORTED_FIELDS.get(name, frozenset())
    for field, value in message.ListFields():
        if field.name not in supported:
            neutral = NEUTRAL_VALUES.get(f"{name}.{field.name}")
            if neutral is None or value != neutral:
                raise ValueError(f"{path}{field.name} is not supported yet")
        elif field.message_type is None:
            continue
        elif field.is_repeated:
            # Two bytes on the wire make a message: count before walking.
            LIMITS[field.name].check(f"number of {path}{field.name}", len(value))
            for i, item in enumerate(value):
                refuse_unsupported(item, f"{path}{field.name}[{i}].")
        else:
            refuse_unsupported(value, f"{path}{field.name}.")


def check_request_id(request_id: str) -> None:
    """Ids go into logs and headers: printable ASCII of limited length."""
    LIMITS["request_id_characters"].check("characters of request_id", len(request_id))
    if not (request_id.isascii() and request_id.isprintable()):
        raise ValueError(f"request_id must be printable ASCII, got {request_id!r}")


def check_prompt(request: pb.GenerateRequest | pb.TokenizeRequest, has_chat_template: bool) -> int:
    """Checks the raw prompt, before anything is made of it; returns its number of characters."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        forms = request.DESCRIPTOR.oneofs_by_name["prompt"].fields
        raise ValueError(
            f"the request has no prompt: set one of {', '.join(f.name for f in forms)}"
        )
    if kind == "token_ids":
        assert isinstance(request, pb.GenerateRequest)
        LIMITS["num_token_ids"].check("number of token_ids", len(request.token_ids.ids))
        return 0
    if kind == "text":
        num_characters = len(request.text)
    else:
        messages = request.chat.messages
        LIMITS["messages"].check("number of chat.messages", len(messages))
        for i, message in enumerate(messages):
            LIMITS["role_characters"].check(
                f"characters of chat.messages[{i}].role", len(message.role)
            )
        num_characters = sum(len(message.content) for message in messages)
    LIMITS["prompt_characters"].check("characters of the prompt", num_characters)
    if kind == "chat" and not has_chat_template:
        raise ValueError("this model has no chat template: set text or token_ids instead of chat")
    return num_characters


def check_token_ids(token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Checks ids to be turned into text."""
    LIMITS["num_token_ids"].check("number of token_ids", len(token_ids))
    if token_ids and max(token_ids) >= vocab_size:
        raise ValueError(f"token_ids must be in [0, {vocab_size - 1}], got {max(token_ids)}")


def sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """The sampling asked for; a seed is chosen when sampling needs one and none is given."""
    for field, value in message.ListFields():
        if field.name in LIMITS:
            LIMITS[field.name].check(field.name, value)
    defaults = SamplingParams()
    if message.HasField("seed"):
        seed = message.seed
    else:
        # 53 bits: a client that keeps numbers as doubles can send it back unchanged.
        seed = secrets.randbits(53) if message.temperature > 0 else defaults.seed
    return SamplingParams(
        # The wire's zero is the default of temperature and top_k, not of top_p.
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else defaults.top_p,
        seed=seed,
    )


def max_tokens_in_effect(
    message: pb.SamplingParams, num_prompt_tokens: int, max_model_len: int
) -> int:
    """``max_tokens`` as given, or what fits behind the prompt up to ``DEFAULT_MAX_TOKENS``."""
    if message.HasField("max_tokens"):
        return message.max_tokens
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens, which leaves no room for output "
            f"within max_model_len ({max_model_len})"
        )
    return min(DEFAULT_MAX_TOKENS, room)
