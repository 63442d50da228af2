"""The values between scheduler, batch and loop: what runs in a step, and what came of it.

Host only: never imports JAX.
"""

from dataclasses import dataclass

from jaxinfer.request import FinishReason, SamplingParams


@dataclass(frozen=True)
class ScheduledSequence:
    """What one sequence brings to a step.

    Its ``token_ids`` stand at positions ``start .. start + len(token_ids) - 1``; ``page_ids`` are
    all pages it holds, enough for those positions. ``samples`` is true when its last token is the
    last one known, so that the step yields a new token for it. ``admission`` numbers the times a
    slot was given to a sequence: it tells a preempted sequence that came back, or a new request
    with an old id, from the one that a late step output belongs to.
    """

    request_id: str
    slot: int
    start: int
    token_ids: tuple[int, ...]
    page_ids: tuple[int, ...]
    samples: bool
    sampling: SamplingParams
    admission: int = 0


@dataclass(frozen=True)
class Schedule:
    """One step: ``decodes`` bring the one token sampled last, ``chunks`` bring prompt tokens.

    A preempted sequence that comes back brings its prompt and its output so far as chunks.
    """

    decodes: tuple[ScheduledSequence, ...] = ()
    chunks: tuple[ScheduledSequence, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


@dataclass(frozen=True)
class StepOutput:
    """What a step yielded, on the host: (request_id, new token ids) of each sampling sequence."""

    token_ids: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class RequestOutput:
    """What a client is told after a step.

    ``token_ids`` are new since the last output and include the end-of-sequence token that ended
    the request. ``num_cached_tokens`` counts prompt tokens that did not have to be computed.
    ``queue_seconds`` is the time from ``Engine.add`` to the first step, None when not measured.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    queue_seconds: float | None = None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for load reports. ``num_*_tokens`` are totals since start.

    ``num_prompt_tokens`` are counted when a request's first token is out, ``num_chunk_tokens`` when
    they are scheduled: prompts, and outputs computed again after preemption.
    """

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_chunk_tokens: int = 0
