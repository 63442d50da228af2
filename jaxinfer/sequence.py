"""One choice of a request as the scheduler remembers it. Host only: never imports JAX."""

from dataclasses import dataclass, field

from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import (
    RequestOutput,
    ScheduledSequence,
    SequenceOutput,
    TokenLogprobs,
)


@dataclass(eq=False)
class Sequence:
    """The mutable host state of one choice: held back, waiting, or running while it has a slot.

        token_ids   | computed, in pages | computed next   | known, not computed yet |
                    0   num_computed_tokens       (+ chunk)               num_tokens

    ``num_computed_tokens`` counts what calls were scheduled for, read or not. The tokens that
    calls in flight sample are not in ``token_ids`` yet but counted in ``num_in_flight_tokens``.
    Both are the most that may be where drafts are verified; what was too much is taken back when a
    call is read, and pages taken for it stay with the sequence.

    ``rank``: smaller is served first and preempted last. It is the time of arrival less a bonus for
    each level of priority, so it never changes, and a late arrival of higher priority cannot
    overtake for ever. ``admission`` numbers each time the sequence got its slot, over all
    sequences, and is ``None`` otherwise. ``num_prefill_tokens`` is what was known then: these
    tokens come as chunks, later ones were sampled on the device since and stand in its token table.

    ``queue_seconds`` is how long it waited for its first admission.

    ``salt`` is the domain of the prefix cache; ``digests[i]`` identifies the tokens up to the end
    of page i, and the first ``num_registered_pages`` of ``page_ids`` need not be registered again.
    The first ``num_drafter_kv_tokens`` are known to have keys and values of the drafter, and the
    cache knows it of the first ``num_drafter_kv_pages``.
    """

    request: Request
    choice: int
    rank: tuple[float, int, int]
    salt: str
    arrival_seconds: float = 0.0
    queue_seconds: float | None = None
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_prefill_tokens: int = 0
    page_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    admission: int | None = None
    has_chunk: bool = False  # since its admission
    digests: list[bytes] = field(default_factory=list)
    num_registered_pages: int = 0
    num_drafter_kv_tokens: int = 0
    num_drafter_kv_pages: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known on the host."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far and read; preemption keeps them."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that may still be sampled, those in flight not counted."""
        return self.request.max_tokens - self.num_output_tokens - self.num_in_flight_tokens

    @property
    def is_running(self) -> bool:
        """True while it holds a slot."""
        return self.admission is not None

    @property
    def is_prefilling(self) -> bool:
        """True while it brings chunks of known tokens."""
        return self.num_computed_tokens < self.num_prefill_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Choices share their prompt: the first one has its log-probabilities computed."""
        return self.choice == 0 and self.request.prompt_logprobs is not None

    def schedule_decode(self, num_tokens: int, num_drafts: int = 0) -> ScheduledSequence:
        """Counts the next tokens as computed, and those they yield as in flight."""
        assert self.slot is not None
        assert self.admission is not None
        start = self.num_computed_tokens
        self.num_computed_tokens += num_tokens
        self.num_in_flight_tokens += num_tokens
        return ScheduledSequence(
            request=self.request,
            choice=self.choice,
            slot=self.slot,
            admission=self.admission,
            start=start,
            num_tokens=num_tokens,
            page_ids=tuple(self.page_ids),
            samples=True,
            num_drafts=num_drafts,
        )

    def schedule_chunk(self, num_tokens: int) -> ScheduledSequence:
        """Counts the next known tokens as computed, and the one they yield as in flight."""
        assert self.slot is not None
        assert self.admission is not None
        prompt = self.request.prompt_token_ids
        start, end = self.num_computed_tokens, self.num_computed_tokens + num_tokens
        is_first, samples = not self.has_chunk, end == self.num_tokens
        self.num_computed_tokens = end
        self.num_in_flight_tokens += samples
        self.has_chunk = True
        return ScheduledSequence(
            request=self.request,
            choice=self.choice,
            slot=self.slot,
            admission=self.admission,
            start=start,
            num_tokens=num_tokens,
            page_ids=tuple(self.page_ids),
            samples=samples,
            token_ids=tuple(self.token_ids[start:end]),
            is_first=is_first,
            cached_token_ids=tuple(self.token_ids[:start]) if is_first else (),
            num_drafter_kv_tokens=self.num_drafter_kv_tokens if is_first else 0,
            next_token_id=prompt[end] if end < len(prompt) else 0,
        )

    def output(
        self, new: SequenceOutput, reason: FinishReason | None, is_first: bool = False
    ) -> RequestOutput:
        """Makes the client's output; ``is_first``: these are the choice's first tokens."""
        is_scored = is_first and self.wants_prompt_logprobs
        return RequestOutput(
            request_id=self.request.request_id,
            token_ids=new.token_ids,
            finish_reason=reason,
            choice=self.choice,
            logprobs=new.logprobs,
            prompt_logprobs=(None, *self.prompt_logprobs) if is_scored else (),
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_preemptions=self.num_preemptions,
            num_drafted_tokens=self.num_drafted_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            queue_seconds=self.queue_seconds,
        )
