"""Decides whether the next step verifies drafts, from what earlier ones brought. Host only.

Tokens do not depend on it: drafts are verified without loss, so that a choice by the clock is free
to be wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxinfer.config import EngineConfig

# Weight of the newest step in a mean; the most steps between two tries of what did not pay, and the
# fewest: a few bad drafts at the start of a text say little, so each failed try doubles them.
NEWEST = 0.1
STEPS_BETWEEN_TRIES = 64
FEWEST_STEPS_BETWEEN_TRIES = 8
# Steps of each kind before a choice: the first after a compilation are slow.
STEPS_TO_LEARN = 3


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


class DraftControl:
    """Compares tokens a second of steps with drafts and without.

    What a step takes depends on the program: ``room(num_decodes)`` tells which one it is. What it
    yields depends on the texts: on each sequence's own drafts so far.
    """

    def __init__(self, config: EngineConfig, room: Callable[[int], object]) -> None:
        self._config, self._room = config, room
        self._batches: dict[object, _Batches] = {}

    def choose(self, gains: Sequence[float | None]) -> int:
        """Returns how many drafts of each decode to verify in the next step.

        ``gains``: tokens a step that each decode has had with drafts lately, None if it had none.
        """
        num_decodes = len(gains)
        if self._config.draft is None or num_decodes > self._config.max_draft_seqs:
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

    def _pays(self, batches: _Batches, gains: Sequence[float | None]) -> bool:
        batches.is_usual = batches.pays([gain for gain in gains if gain is not None])
        if batches.is_usual:
            batches.steps_to_try = FEWEST_STEPS_BETWEEN_TRIES
        return batches.is_usual

    def note(self, num_decodes: int, has_drafts: bool, seconds: float) -> None:
        """A step of decodes alone took ``seconds``."""
        if self._config.draft is None or num_decodes > self._config.max_draft_seqs:
            return
        batches = self._of(num_decodes)
        catches_up = self._config.draft == "model" and has_drafts and batches.was_plain
        batches.was_plain = not has_drafts
        if catches_up:
            return  # a draft model has read what came without it: the next step tells what it costs
        is_try = has_drafts != batches.is_usual
        if is_try and has_drafts:
            batches.steps_to_try = min(2 * batches.steps_to_try, STEPS_BETWEEN_TRIES)
        batches.steps_since_try = 0 if is_try else batches.steps_since_try + 1
        mean = batches.draft_seconds if has_drafts else batches.plain_seconds
        mean.add(seconds)

    def _of(self, num_decodes: int) -> _Batches:
        return self._batches.setdefault(self._room(num_decodes), _Batches())
