"""Events that a client gets, read from messages, and completions. Imports no gRPC, no JAX."""

from collections.abc import Iterable
from dataclasses import dataclass

from serving.proto.jaxinfer.v1 import inference_pb2 as pb


@dataclass(frozen=True)
class TopLogprob:
    """One of the most probable tokens. ``token`` is its bytes, not always whole characters."""

    token_id: int
    logprob: float
    token: bytes


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's natural log-probability and rank (1 is the most probable), and the best ones."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Started:
    """The first event.

    ``seeds`` has one entry, of which choice i uses that and i; greedy sampling uses none.
    ``prompt_logprobs``, where asked for, has one entry a prompt token, None for the first.
    """

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    seeds: tuple[int, ...]
    max_tokens: int
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True)
class Delta:
    """New text and tokens of one choice; ``logprobs`` go with the tokens, where asked for."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


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
    """The last event of a choice. ``reason`` is "stop", "length" or "abort".

    ``stop_token_id`` or ``stop_string`` is what ended it, for "stop".
    """

    choice: int
    reason: str
    stop_token_id: int | None
    stop_string: str | None
    usage: Usage
    timings: Timings


type Event = Started | Delta | Finished


@dataclass(frozen=True)
class Completion:
    """All events of one choice, put together."""

    text: str
    token_ids: tuple[int, ...]
    started: Started
    finished: Finished
    logprobs: tuple[TokenLogprobs, ...] = ()


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
                prompt_logprobs=(
                    *(None for _ in started.prompt_logprobs[:1]),
                    *_logprobs(started.prompt_logprobs[1:]),
                ),
            )
        case "delta":
            delta = response.delta
            return Delta(
                delta.choice, delta.text, tuple(delta.token_ids), _logprobs(delta.logprobs)
            )
        case "finished":
            return _finished(response.finished)
        case kind:
            raise ValueError(f"this client does not know the event {kind!r}")


def _logprobs(entries: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=tuple(TopLogprob(top.token_id, top.logprob, top.token) for top in entry.top),
        )
        for entry in entries
    )


def _finished(finished: pb.Finished) -> Finished:
    usage, timings = finished.usage, finished.timings
    return Finished(
        choice=finished.choice,
        reason=pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        stop_string=finished.stop_string if finished.HasField("stop_string") else None,
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


def completions_of(events: Iterable[Event]) -> tuple[Completion, ...]:
    """Puts the events of a request together: one completion a choice, in order of choices."""
    started: Started | None = None
    deltas: dict[int, list[Delta]] = {}
    ends: dict[int, Finished] = {}
    for event in events:
        match event:
            case Started():
                started = event
            case Delta():
                deltas.setdefault(event.choice, []).append(event)
            case Finished():
                ends[event.choice] = event
    if started is None or not ends:
        raise ValueError("the stream ended before the request did")
    return tuple(
        Completion(
            text="".join(delta.text for delta in deltas.get(choice, ())),
            token_ids=tuple(i for delta in deltas.get(choice, ()) for i in delta.token_ids),
            started=started,
            finished=finished,
            logprobs=tuple(entry for delta in deltas.get(choice, ()) for entry in delta.logprobs),
        )
        for choice, finished in sorted(ends.items())
    )
