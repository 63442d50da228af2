"""What the scheduler remembers of one request. Host only: never imports JAX."""

from dataclasses import dataclass, field

from jaxinfer.request import Request


@dataclass(eq=False)
class Sequence:
    """The mutable host state of one request: waiting, or running while it has a slot.

        token_ids   | computed, in pages | computed next   | known, not computed yet |
                    0   num_computed_tokens       (+ chunk)               num_tokens

    ``admission`` numbers each time the sequence got its slot, over all sequences, and is ``None``
    while it waits. ``num_prefill_tokens`` is what it brought then: these tokens come as chunks,
    later ones were sampled on the device since and stand in its token table.
    """

    request: Request
    arrival: int
    choice: int = 0
    arrival_seconds: float = 0.0
    priority_seconds: float = 10.0
    salt: str = ""
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_registered: int = 0
    digests: list[bytes] = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    is_new: bool = True
    num_prefill_tokens: int = 0
    page_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    admission: int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known on the host."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far; preemption keeps them."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def is_running(self) -> bool:
        """True while it holds a slot."""
        return self.admission is not None

    @property
    def is_decoding(self) -> bool:
        """True when all it brings is a token sampled since its admission."""
        return self.num_prefill_tokens <= self.num_computed_tokens == self.num_tokens + self.num_in_flight_tokens - 1

    @property
    def rank(self):
        """Smaller is served first and preempted last: first come, first served.

        This is the one place where priorities go. Arrival plus a handicap for each level of
        priority never changes while a request lives, so both queues stay sorted, and it ages: a
        late arrival of higher priority cannot overtake for ever.
        """
        return (self.arrival_seconds - self.request.priority * self.priority_seconds, self.arrival, self.choice)
