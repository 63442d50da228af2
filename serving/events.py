"""What a client sends and gets, and how it stands in messages. Imports neither gRPC nor JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from serving.proto.jaxinfer.v1 import inference_pb2 as pb


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


# Text, token ids, or a conversation.
type Prompt = str | Sequence[int] | Sequence[Message]


class GenerateOptions(TypedDict, total=False):
    """Keywords of ``generate`` and ``complete``. What is left out is the server's default.

    ``timeout`` is the call's deadline in seconds; the others are fields of the .proto.
    """

    request_id: str
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool
    stream: bool
    add_special_tokens: bool
    timeout: float


@dataclass(frozen=True)
class Started:
    """The first event. ``seeds`` has one entry a choice; greedy sampling uses none."""

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    seeds: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Delta:
    """New text and tokens of one choice."""

    choice: int
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Usage:
    """Counts of one choice, in tokens."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_preemptions: int


@dataclass(frozen=True)
class Timings:
    """Seconds since the server received the request; None is not known."""

    queue_seconds: float | None
    time_to_first_token_seconds: float | None
    total_seconds: float | None


@dataclass(frozen=True)
class Finished:
    """The last event of a choice. ``reason`` is "stop", "length" or "abort"."""

    choice: int
    reason: str
    stop_token_id: int | None
    usage: Usage
    timings: Timings


type Event = Started | Delta | Finished


@dataclass(frozen=True)
class Completion:
    """All events of a request with one choice, put together."""

    text: str
    token_ids: tuple[int, ...]
    started: Started
    finished: Finished


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """The message of a call; raises ``ValueError`` for values that no message can hold."""
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    for name, value in options.items():
        if name == "timeout" or value is None:
            continue
        target = (
            request.sampling if name in pb.SamplingParams.DESCRIPTOR.fields_by_name else request
        )
        setattr(target, name, value)
    return request


def tokenize_request(
    prompt: str | Sequence[Message], add_special_tokens: bool | None
) -> pb.TokenizeRequest:
    """The message of a call."""
    request = pb.TokenizeRequest(add_special_tokens=add_special_tokens)
    _set_prompt(request, prompt)
    return request


def _set_prompt(request: pb.GenerateRequest | pb.TokenizeRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    messages = [item for item in prompt if isinstance(item, Message)]
    if messages:
        if len(messages) != len(prompt):
            raise ValueError("a prompt has either messages or token ids, not both")
        request.chat.messages.extend(
            pb.ChatMessage(role=message.role, content=message.content) for message in messages
        )
    elif isinstance(request, pb.GenerateRequest):
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(item for item in prompt if not isinstance(item, Message))
    else:
        raise ValueError("only a text or messages can be tokenized")


def event_of(response: pb.GenerateResponse) -> Event:
    """The event in a response; raises ``ValueError`` when it is newer than this client."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                request_id=started.request_id,
                num_prompt_tokens=started.num_prompt_tokens,
                num_cached_tokens=started.num_cached_tokens,
                seeds=tuple(started.seeds),
                max_tokens=started.max_tokens,
            )
        case "delta":
            delta = response.delta
            return Delta(delta.choice, delta.text, tuple(delta.token_ids))
        case "finished":
            return _finished(response.finished)
        case kind:
            raise ValueError(f"this client does not know the event {kind!r}")


def _finished(finished: pb.Finished) -> Finished:
    usage, timings = finished.usage, finished.timings
    return Finished(
        choice=finished.choice,
        reason=pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        usage=Usage(
            **{field.name: getattr(usage, field.name) for field in usage.DESCRIPTOR.fields}
        ),
        timings=Timings(
            **{
                field.name: getattr(timings, field.name) if timings.HasField(field.name) else None
                for field in timings.DESCRIPTOR.fields
            }
        ),
    )


def completion_of(events: list[Event]) -> Completion:
    """Puts the events of a request with one choice together."""
    deltas = [event for event in events if isinstance(event, Delta)]
    (started,) = (event for event in events if isinstance(event, Started))
    (finished,) = (event for event in events if isinstance(event, Finished))
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        started=started,
        finished=finished,
    )
