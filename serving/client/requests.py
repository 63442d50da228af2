"""A client's wishes as messages: refused here if no message can hold them. Imports no gRPC."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from google.protobuf.message import Message as ProtobufMessage

from serving.client.options import GenerateOptions, Message, Prompt, PromptOptions
from serving.message_size import MAX_MESSAGE_BYTES
from serving.proto.jaxinfer.v1 import inference_pb2 as pb

MAX_TIMEOUT_SECONDS = 1_000_000_000


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """The message of a call.

    Raises ``TypeError`` naming the nearest option for one that does not exist, and ``TypeError``
    or ``ValueError`` naming the field for values that no message can hold.
    """
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    _set_options(request, options)
    return _checked_size(request)


def tokenize_request(prompt: str | Sequence[Message], options: PromptOptions) -> pb.TokenizeRequest:
    """The message of a call; raises what ``generate_request`` does."""
    request = pb.TokenizeRequest()
    _set_prompt(request, prompt)
    _set_options(request, options)
    return _checked_size(request)


def detokenize_request(
    token_ids: Sequence[int], *, skip_control_tokens: bool
) -> pb.DetokenizeRequest:
    """The message of a call; raises ``TypeError`` or ``ValueError`` naming the argument."""
    request = pb.DetokenizeRequest()
    with _naming("skip_control_tokens", skip_control_tokens):
        request.skip_control_tokens = skip_control_tokens
    if not _is_sequence(token_ids) or isinstance(token_ids, str):
        raise TypeError(f"token_ids must be several integers, got {token_ids!r:.80}")
    with _naming("token_ids", token_ids):
        request.token_ids.extend(token_ids)
    return _checked_size(request)


def abort_request(request_id: str) -> pb.AbortRequest:
    """The message of a call; raises ``TypeError`` or ``ValueError`` naming the argument."""
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be a str, got {request_id!r:.80}")
    request = pb.AbortRequest()
    with _naming("request_id", request_id):
        request.request_id = request_id
    return request


def check_timeout(timeout: float) -> None:
    """Raises ``TypeError`` or ``ValueError`` for what is no time to wait."""
    # gRPC fails at once where seconds are more than it can count, infinitely many included.
    wanted = f"timeout must be a number of seconds between 0 and {MAX_TIMEOUT_SECONDS}"
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"{wanted}, got {timeout!r:.80}")
    if not 0 <= timeout <= MAX_TIMEOUT_SECONDS:
        raise ValueError(f"{wanted}, got {timeout!r:.80}")


def check_one_choice(options: GenerateOptions, several: str = "complete_choices") -> None:
    """Raises ``ValueError`` where there may be several completions, or none."""
    if options.get("n") not in (None, 1):
        raise ValueError(f"n is {options.get('n')}: {several} returns several choices")


def _checked_size[M: ProtobufMessage](request: M) -> M:
    """The request, if a server reads it: gRPC's RESOURCE_EXHAUSTED would say "try again"."""
    if (size := request.ByteSize()) > MAX_MESSAGE_BYTES:
        raise ValueError(f"the request has {size} bytes, the limit is {MAX_MESSAGE_BYTES}")
    return request


def _set_options(
    request: pb.GenerateRequest | pb.TokenizeRequest, options: Mapping[str, object]
) -> None:
    known = GenerateOptions if isinstance(request, pb.GenerateRequest) else PromptOptions
    for name, value in options.items():
        if name not in known.__annotations__:
            near = difflib.get_close_matches(name, known.__annotations__, n=1, cutoff=0.0)
            raise TypeError(f"there is no option {name!r:.80}; the nearest is {near[0]!r}")
        if value is None:
            continue
        if name == "timeout":
            check_timeout(cast(float, value))
            continue
        target = request
        if name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
            assert isinstance(request, pb.GenerateRequest)
            target = request.sampling
        elif name in pb.Chat.DESCRIPTOR.fields_by_name:
            if request.WhichOneof("prompt") != "chat":
                raise ValueError(f"{name} is for a prompt of messages")
            target = request.chat
        field = target.DESCRIPTOR.fields_by_name[name]
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.is_repeated and isinstance(value, str):
            raise ValueError(f"{name} must be a list or its like, got {value!r:.80}")
        with _naming(name, value):
            if is_map != isinstance(value, Mapping):
                raise TypeError("a mapping is wanted" if is_map else "no mapping is wanted")
            if is_map:
                getattr(target, name).update(value)
            elif not field.is_repeated:
                setattr(target, name, value)
            else:
                getattr(target, name).extend(value)


@contextmanager
def _naming(name: str, value: object) -> Iterator[None]:
    """Around giving ``value`` to a field: protobuf's own errors do not say which one it was."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode ({error.reason}): {value!r:.80}") from None
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}, got {value!r:.80}") from None


def _set_prompt(request: pb.GenerateRequest | pb.TokenizeRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        with _naming("the prompt", prompt):
            request.text = prompt
        return
    wanted = "a text (str), messages (serving.client.Message) or token ids (int)"
    if not _is_sequence(prompt):
        raise TypeError(f"the prompt must be {wanted}, got {prompt!r:.80}")
    for i, item in enumerate(prompt):
        # Anything that has __index__ is an integer, NumPy's for one.
        if not isinstance(item, Message) and not hasattr(item, "__index__"):
            raise TypeError(f"the prompt must be {wanted}, got {item!r:.80} as its item {i}")
    messages = [item for item in prompt if isinstance(item, Message)]
    if messages:
        if len(messages) != len(prompt):
            raise ValueError("a prompt has either messages or token ids, not both")
        for i, message in enumerate(messages):
            _add_message(request.chat, f"message {i} of the prompt", message)
    elif isinstance(request, pb.GenerateRequest):
        request.token_ids.SetInParent()
        with _naming("the prompt", prompt):
            request.token_ids.ids.extend(item for item in prompt if not isinstance(item, Message))
    else:
        raise ValueError(f"only a text or messages can be tokenized, got {prompt!r:.80}")


def _add_message(chat: pb.Chat, name: str, message: Message) -> None:
    texts = {"role": message.role, "content": message.content}
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    texts |= {field: value for field, value in optional.items() if value is not None}
    calls = message.tool_calls
    if not _is_sequence(calls) or isinstance(calls, str):
        raise TypeError(f"{name}: tool_calls must be several strings, got {calls!r:.80}")
    for part in (*texts.values(), *calls):
        if not isinstance(part, str):  # protobuf would take bytes for a text
            raise TypeError(
                f"{name}: {', '.join(texts)} and tool_calls must be str, got {part!r:.80}"
            )
    with _naming(name, message):
        chat.messages.add(**texts, tool_calls=calls)


def _is_sequence(value: object) -> bool:
    """Tells whether items can be read by number and again, as of arrays; bytes are no items."""
    if isinstance(value, bytes | bytearray | memoryview | Mapping):
        return False
    return isinstance(value, Sequence) or all(
        hasattr(value, name) for name in ("__len__", "__getitem__", "__iter__")
    )
