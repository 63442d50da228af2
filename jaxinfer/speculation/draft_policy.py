"""The policy of drafting: how many drafts each decode of the next step is worth. Host only.

It learns from what earlier steps took and brought. Tokens do not depend on it: drafts are verified
without loss, so that a choice by the clock is free to be wrong.
"""

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from jaxinfer.config import EngineConfig
from jaxinfer.schedule import Schedule, SequenceOutput, StepOutput

# Weight of the newest step in a mean; the most steps between two tries of what did not pay, and the
# fewest: a few bad drafts at the start of a text say little, so each failed try doubles them.
NEWEST = 0.1
STEPS_BETWEEN_TRIES = 64
FEWEST_STEPS_BETWEEN_TRIES = 8
# Steps of each kind before a choice: the first after a compilation are slow.
STEPS_TO_LEARN = 3
# How many tokens a sequence whose drafts were all wrong goes on without, before one is tried.
TOKENS_WITHOUT_DRAFTS = 16
# Weight of the newest step in what drafts bring a sequence: some steps, since texts change.
NEWEST_GAIN = 0.2


@dataclass
class _Mean:
    """A running mean of recent values."""

    count: int = 0
    value: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(NEWEST, 1 / self.count)


@dataclass
class _Batches:
    """Seconds that steps of about as many decodes took, plain and with drafts."""

    plain_seconds: _Mean = field(default_factory=_Mean)
    draft_seconds: _Mean = field(default_factory=_Mean)
    steps_since_try: int = 0
    steps_to_try: int = FEWEST_STEPS_BETWEEN_TRIES  # of drafts where plain steps are usual
    is_usual: bool = False  # that steps have drafts
    was_plain: bool = False

    @property
    def is_learning(self) -> bool:
        return min(self.plain_seconds.count, self.draft_seconds.count) < STEPS_TO_LEARN

    def pays(self, gains: Sequence[float]) -> bool:
        """Tokens a second with drafts against those without; nothing known is worth a try."""
        gain = sum(gains) / len(gains) if gains else math.inf
        return gain * self.plain_seconds.value >= self.draft_seconds.value


@dataclass
class _History:
    """The drafts of one sequence so far.

    ``gain``: tokens a step that drafts brought in the last of ``num_gains`` calls with drafts, 1
    for none that was right. ``num_drafts`` are wanted in a step where each of them costs something;
    ``num_undrafted`` tokens came since the last one.
    """

    num_drafts: int
    gain: float | None = None
    num_gains: int = 0
    num_undrafted: int = 0

    def note_gain(self, output: SequenceOutput) -> None:
        """Tokens a step of a call with drafts: a mean at first, then recent ones count more."""
        num_steps = len(output.token_ids) - output.num_accepted
        if num_steps > 0:
            gain = len(output.token_ids) / num_steps
            self.num_gains += 1
            known = gain if self.gain is None else self.gain
            self.gain = known + max(NEWEST_GAIN, 1 / self.num_gains) * (gain - known)

    def adapt(self, output: SequenceOutput, most: int) -> None:
        """Two more drafts where all of a call were right, one less where not; at most ``most``.

        The rule of assisted generation in transformers (Gante 2023), and further down to none:
        that is tried again some tokens later.
        """
        if not output.num_drafted:
            self.num_undrafted += len(output.token_ids)
            if not self.num_drafts and self.num_undrafted >= TOKENS_WITHOUT_DRAFTS:
                self.num_drafts = 1
            return
        self.num_undrafted = 0
        is_right = output.num_accepted == output.num_drafted
        self.num_drafts = max(0, min(most, self.num_drafts + (2 if is_right else -1)))


class DraftPolicy:
    """Compares tokens a second of steps with drafts and without, and adapts to each sequence.

    What a step takes depends on the program, see ``limit``. What it yields depends on the texts: on
    each sequence's own drafts so far. A sequence is told by any value that is its own while it
    lives.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._rooms: list[int] = []
        # Drafts that cost the same however many they are need not be few.
        self._adapts_each = config.adapt_drafts and config.drafter.costs_each
        self._batches: dict[int, _Batches] = {}
        self._histories: dict[Hashable, _History] = {}

    @property
    def num_known(self) -> int:
        """Returns how many sequences it remembers."""
        return len(self._histories)

    def limit(self, rooms: Collection[int]) -> None:
        """Tells apart steps by ``rooms``: decodes that the compiled ones with drafts have room for.

        Without them all steps are taken for the same.
        """
        self._rooms = sorted(rooms)

    def choose(self, sequences: Collection[Hashable]) -> list[int]:
        """Returns how many drafts to verify of each of the next step's decodes."""
        histories = [self._histories.get(sequence) for sequence in sequences]
        most = self.choose_most([known.gain if known else None for known in histories])
        if not self._adapts_each:
            return [most] * len(histories)
        return [min(most, known.num_drafts) if known else most for known in histories]

    def choose_most(self, gains: Sequence[float | None]) -> int:
        """Returns how many drafts of any decode to verify in the next step.

        ``gains``: tokens a step that each decode has had with drafts lately, None if it had none.
        """
        num_decodes = len(gains)
        if not self._is_drafted(num_decodes):
            return 0
        if not self._config.adapt_drafts:
            return self._config.num_drafts
        batches = self._of(num_decodes)
        if batches.is_learning:
            # In turns, plain ones first: they are what is lost where drafts are bad.
            is_draft = batches.plain_seconds.count > batches.draft_seconds.count
        elif self._pays(batches, gains):
            # Plain steps become faster or slower too, as sequences grow.
            is_draft = batches.steps_since_try < STEPS_BETWEEN_TRIES
        else:
            is_draft = batches.steps_since_try >= batches.steps_to_try
        return self._config.num_drafts if is_draft else 0

    def note_output(self, sequence: Hashable, num_drafts: int, output: SequenceOutput) -> None:
        """Learns from the yield of a call in which each step had ``num_drafts`` at most."""
        if not self._config.most_drafts:
            return
        known = self._histories.setdefault(sequence, _History(self._config.num_drafts))
        if num_drafts:
            known.note_gain(output)
        if self._adapts_each:
            known.adapt(output, self._config.num_drafts)

    def forget(self, sequence: Hashable) -> None:
        """Forgets a sequence that has ended; unknown ones are ignored."""
        self._histories.pop(sequence, None)

    def note_call(
        self, schedule: Schedule, output: StepOutput, has_drafts: bool, seconds: float
    ) -> None:
        """Learns from the ``seconds`` that the device took for a call, if it had decodes alone."""
        is_of_decodes = schedule.decodes and not schedule.chunks
        if is_of_decodes and any(sequence.token_ids for sequence in output.sequences):
            self.note_step(len(schedule.decodes), has_drafts, seconds / schedule.num_steps)

    def note_step(self, num_decodes: int, has_drafts: bool, seconds: float) -> None:
        """Learns that a step of decodes alone took ``seconds``."""
        if not self._is_drafted(num_decodes):
            return
        batches = self._of(num_decodes)
        catches_up = self._config.drafter.has_pages and has_drafts and batches.was_plain
        batches.was_plain = not has_drafts
        if catches_up:
            return  # its pages lagged behind plain steps: the next step tells what it costs
        is_try = has_drafts != batches.is_usual
        if is_try and has_drafts:
            batches.steps_to_try = min(2 * batches.steps_to_try, STEPS_BETWEEN_TRIES)
        batches.steps_since_try = 0 if is_try else batches.steps_since_try + 1
        mean = batches.draft_seconds if has_drafts else batches.plain_seconds
        mean.add(seconds)

    def _is_drafted(self, num_decodes: int) -> bool:
        """Tells if a step of so many decodes may have drafts."""
        return self._config.most_drafts > 0 and num_decodes <= self._config.max_draft_seqs

    def _pays(self, batches: _Batches, gains: Sequence[float | None]) -> bool:
        batches.is_usual = batches.pays([gain for gain in gains if gain is not None])
        if batches.is_usual:
            batches.steps_to_try = FEWEST_STEPS_BETWEEN_TRIES
        return batches.is_usual

    def _of(self, num_decodes: int) -> _Batches:
        room = next((room for room in self._rooms if room >= num_decodes), 0)
        return self._batches.setdefault(room, _Batches())
