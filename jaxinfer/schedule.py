"""The values between scheduler, batch and loop: what runs in a step, and what came of it.

Host only: never imports JAX.
"""

from dataclasses import dataclass

from jaxinfer.request import FinishReason, Request


@dataclass(frozen=True)
class ScheduledSequence:
    """The part that one sequence, a choice of a request, has in a call of the device.

    A chunk's ``token_ids`` stand at positions ``start ..``. A decode has none of its own: the
    device knows its last token and position; ``num_tokens`` says how many it may yield at most
    (a chunk: ``len(token_ids)``). Where drafts are verified ``start`` is the last position that it
    may be at. ``page_ids`` are all pages it holds, enough for every
    position that is computed. ``samples`` is true when a new token comes of it: for decodes always,
    for a chunk when its last token is the last one known.

    ``admission`` numbers the times a slot was given to a sequence: it tells a preempted sequence
    that came back, or a new request with an old id, from the one a late step output belongs to.
    Of a decode at most ``num_drafts`` drafts are verified in a step.
    The first chunk of an admission has ``is_first``, and in ``cached_token_ids`` the tokens at
    positions before ``start``, whose keys and values were found in the prefix cache, of the first
    ``num_drafter_kv_tokens`` of them also those of the drafter.
    ``next_token_id`` follows the chunk in the prompt, 0 where it is not known.
    """

    request: Request
    choice: int
    slot: int
    admission: int
    start: int
    num_tokens: int
    page_ids: tuple[int, ...]
    samples: bool
    token_ids: tuple[int, ...] = ()
    is_first: bool = False
    cached_token_ids: tuple[int, ...] = ()
    num_drafter_kv_tokens: int = 0
    num_drafts: int = 0
    next_token_id: int = 0

    @property
    def request_id(self) -> str:
        """The id of its request."""
        return self.request.request_id


@dataclass(frozen=True)
class Schedule:
    """One call: ``decodes`` continue from the token sampled last, ``chunks`` bring known tokens.

    A preempted sequence that comes back brings its prompt and its output so far as chunks. Without
    chunks the device may run ``num_steps`` steps in one call. ``num_drafts`` is the largest of its
    decodes' numbers of drafts.
    """

    decodes: tuple[ScheduledSequence, ...] = ()
    chunks: tuple[ScheduledSequence, ...] = ()
    num_steps: int = 1
    num_drafts: int = 0

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's natural log-probability under the model, before penalties, temperature and filters.

    ``rank`` 1 is the most probable. ``top`` has the most probable tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SequenceOutput:
    """The yield of a call for one scheduled sequence.

    ``token_ids`` are new; fewer than ``num_tokens`` when the sequence ended on the device, or
    drafts were wrong: ``num_drafted`` were verified, ``num_accepted`` of them right. ``logprobs``
    go with them where asked for. ``prompt_logprobs`` are those of the tokens at positions
    ``start + 1 ..`` of a chunk, as far as they are prompt tokens. ``num_drafter_kv_tokens`` have
    keys and values of the drafter now.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_drafted: int = 0
    num_accepted: int = 0
    num_drafter_kv_tokens: int = 0


@dataclass(frozen=True)
class StepOutput:
    """The yield of a call, on the host: one entry a scheduled sequence, decodes before chunks."""

    sequences: tuple[SequenceOutput, ...]


@dataclass(frozen=True)
class RequestOutput:
    """News of one choice for its client, after a step.

    ``token_ids`` are new since the last output and include the end-of-sequence or stop token that
    ended the choice; ``logprobs`` go with them where asked for. ``prompt_logprobs`` come with
    choice 0's first output, one a prompt token, None for the first one. ``num_cached_tokens``
    counts prompt tokens that did not have to be computed when the choice was first admitted.
    ``queue_seconds`` is the time from ``Engine.add`` to the first step, None when not measured.
    ``num_drafted_tokens`` were drafted and verified so far, ``num_accepted_tokens`` of them right.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    choice: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    queue_seconds: float | None = None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for load reports. ``num_*_tokens`` are totals since start.

    ``num_waiting`` and ``num_running`` count choices. ``num_prompt_tokens`` are counted when a
    choice's first token is out, ``num_cached_tokens`` when it is admitted: tokens found in the
    prefix cache, also those of a preempted sequence that came back. ``num_chunk_tokens`` are
    counted when they are scheduled: prompts, and outputs computed again after preemption.
    ``num_free_pages`` includes ``num_cached_pages``, which nobody holds and a prompt may find.
    ``num_drafted_tokens`` are drafts that were verified, ``num_accepted_tokens`` the right ones.
    """

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_chunk_tokens: int = 0
    num_cached_tokens: int = 0
    num_cached_pages: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
