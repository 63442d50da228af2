"""Prompts and options that a client gives. Knows no messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    ``tool_calls``, each a JSON object as text, are an assistant's; a tool answers ``tool_call_id``.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: Sequence[str] = ()
    tool_call_id: str | None = None


# Text, token ids, or a conversation.
type Prompt = str | Sequence[int] | Sequence[Message]


class PromptOptions(TypedDict, total=False):
    """Ways from prompt to tokens: fields of the .proto. All but the first two are for chats."""

    add_special_tokens: bool
    parse_special_tokens: bool
    add_generation_prompt: bool
    continue_final_message: bool
    template_arguments: Mapping[str, str]
    tools: Sequence[str]


class GenerateOptions(PromptOptions, total=False):
    """Keywords of ``generate`` and ``complete``. What is left out is the server's default.

    ``timeout`` is the call's deadline in seconds; the others are fields of the .proto.
    """

    request_id: str
    model: str
    priority: int
    cache_salt: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_in_output: bool
    n: int
    logprobs: int
    prompt_logprobs: int
    skip_control_tokens: bool
    stream: bool
    timeout: float
