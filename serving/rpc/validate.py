"""From a hostile message to checked values: what is supported, and within which limits.

Knows the schema and ``jaxinfer.request.LIMITS``; neither tokenizes nor talks to a client.
Every function raises ``ValueError`` naming the field, the value and the limit.
"""

import dataclasses
from collections.abc import Mapping

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxinfer.request import LIMITS, SAMPLING_OPTIONS, Ending, SamplingParams
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.request_checks import default_max_tokens, random_seed
from serving.text.conversation import CHAT_LIMITS
from serving.text.output_text import TextOptions, check_stop

# The fields that are served. Whatever is not named here is refused when it is set, so a field
# that is new in the schema is refused until somebody builds it.
SUPPORTED_FIELDS: Mapping[str, frozenset[str]] = {
    "GenerateRequest": frozenset(
        (
            *("request_id", "text", "token_ids", "chat", "sampling", "stream"),
            *("add_special_tokens", "parse_special_tokens"),
            *("priority", "cache_salt", "model"),
        )
    ),
    "SamplingParams": frozenset(
        (
            *(option.name for option in SAMPLING_OPTIONS),
            *("seed", "logit_bias"),
            *("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
            *("include_stop_in_output", "n", "logprobs", "prompt_logprobs"),
            "skip_control_tokens",
        )
    ),
    "TokenIds": frozenset(("ids",)),
    "Chat": frozenset(
        (
            *("messages", "add_generation_prompt", "continue_final_message"),
            *("template_arguments", "tools"),
        )
    ),
    "ChatMessage": frozenset(("role", "content", "name", "tool_calls", "tool_call_id")),
    "TokenizeRequest": frozenset(("text", "chat", "add_special_tokens", "parse_special_tokens")),
    "DetokenizeRequest": frozenset(("token_ids", "skip_control_tokens")),
    "AbortRequest": frozenset(("request_id",)),
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
            raise ValueError(f"{path}{field.name} is not supported yet")
        elif field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        elif field.is_repeated:
            # Two bytes on the wire make a message: count before walking.
            LIMITS[field.name].check(f"number of {path}{field.name}", len(value))
            for i, item in enumerate(value):
                refuse_unsupported(item, f"{path}{field.name}[{i}].")
        else:
            refuse_unsupported(value, f"{path}{field.name}.")


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
        num_characters = _check_chat(request.chat)
    LIMITS["prompt_characters"].check("characters of the prompt", num_characters)
    if kind == "chat" and not has_chat_template:
        raise ValueError("this model has no chat template: set text or token_ids instead of chat")
    return num_characters


def _check_chat(chat: pb.Chat) -> int:
    LIMITS["messages"].check("number of chat.messages", len(chat.messages))
    for i, message in enumerate(chat.messages):
        path = f"characters of chat.messages[{i}]"
        LIMITS["role_characters"].check(f"{path}.role", len(message.role))
        if message.HasField("name"):
            CHAT_LIMITS["name_characters"].check(f"{path}.name", len(message.name))
        if message.HasField("tool_call_id"):
            CHAT_LIMITS["name_characters"].check(f"{path}.tool_call_id", len(message.tool_call_id))
        num_calls = len(message.tool_calls)
        CHAT_LIMITS["num_tools"].check(f"number of chat.messages[{i}].tool_calls", num_calls)
    CHAT_LIMITS["num_tools"].check("number of chat.tools", len(chat.tools))
    arguments = chat.template_arguments
    CHAT_LIMITS["num_template_arguments"].check("number of template_arguments", len(arguments))
    for name in arguments:
        CHAT_LIMITS["template_argument_characters"].check(
            f"characters of {name!r:.80}, a name in template_arguments", len(name)
        )
    if chat.continue_final_message and chat.add_generation_prompt:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other")
    calls = (call for message in chat.messages for call in message.tool_calls)
    contents = (message.content for message in chat.messages)
    return sum(map(len, (*contents, *calls, *chat.tools, *arguments.values())))


def check_generation(request: pb.GenerateRequest, model_name: str) -> None:
    """Checks what can be known to be wrong before anything is made of the request."""
    if request.model and request.model != model_name:
        raise ValueError(f"model must be {model_name!r}, which is served, got {request.model!r}")
    LIMITS["priority"].check("priority", request.priority)
    LIMITS["cache_salt_characters"].check("characters of cache_salt", len(request.cache_salt))
    sampling = request.sampling
    for name in ("max_tokens", "min_tokens", "n", "logprobs", "prompt_logprobs"):
        if sampling.HasField(name):
            LIMITS[name].check(name, getattr(sampling, name))
    LIMITS["num_ending_token_ids"].check("number of stop_token_ids", len(sampling.stop_token_ids))
    check_stop(sampling.stop)


def sampling_params(
    message: pb.SamplingParams, defaults: SamplingParams | None = None
) -> SamplingParams:
    """Returns the sampling asked for; what is not set is as in ``defaults``.

    A token's bias that is not given is that of ``defaults`` too. A seed is chosen when sampling
    needs one and none is given.
    """
    LIMITS["num_logit_bias"].check("number of logit_bias", len(message.logit_bias))
    defaults = defaults or SamplingParams()
    biases = dict(defaults.logit_bias) | dict(message.logit_bias)
    names = (*(option.name for option in SAMPLING_OPTIONS), "seed")
    sampling = dataclasses.replace(
        defaults,
        logit_bias=tuple(sorted(biases.items())),
        **{name: getattr(message, name) for name in names if message.HasField(name)},
    )
    if sampling.temperature > 0 and not message.HasField("seed"):
        return dataclasses.replace(sampling, seed=random_seed())
    return sampling


def min_tokens_in_effect(message: pb.SamplingParams, default: int, max_tokens: int) -> int:
    """Returns ``min_tokens`` as given, or the default, of which no more than may come."""
    return message.min_tokens if message.HasField("min_tokens") else min(default, max_tokens)


def text_options(message: pb.SamplingParams, defaults: Ending | None = None) -> TextOptions:
    """Returns the wishes for the text; without stop strings those of ``defaults``."""
    defaults = defaults or Ending()
    min_tokens = message.min_tokens if message.HasField("min_tokens") else defaults.min_tokens
    return TextOptions(
        stop=tuple(message.stop) or defaults.stop,
        include_stop_in_output=message.include_stop_in_output,
        skip_control_tokens=is_on(message, "skip_control_tokens"),
        min_tokens=min_tokens,
    )


def is_on(message: Message, name: str) -> bool:
    """Reads a boolean field whose default is true."""
    return not message.HasField(name) or getattr(message, name)


def max_tokens_in_effect(
    message: pb.SamplingParams, num_prompt_tokens: int, max_model_len: int
) -> int:
    """Returns ``max_tokens`` as given, or the default behind so long a prompt."""
    if message.HasField("max_tokens"):
        return message.max_tokens
    return default_max_tokens(num_prompt_tokens, max_model_len)
