"""The choice to draft or not, by what drafting brought."""

import itertools
from typing import Any

import pytest

from jaxinfer.config import EngineConfig
from jaxinfer.schedule import Schedule, ScheduledSequence, SequenceOutput, StepOutput
from jaxinfer.speculation.draft_policy import (
    STEPS_BETWEEN_TRIES,
    TOKENS_WITHOUT_DRAFTS,
    DraftPolicy,
)
from tests.jaxinfer.fake_device import make_request

CONFIG = EngineConfig(draft="ngram", num_drafts=4, max_draft_seqs=8)


def run(
    policy: DraftPolicy, num_steps: int, gain: float | None, cost: float, size: int = 1
) -> list[bool]:
    """Returns which of the steps had drafts; one with drafts takes ``cost`` times as long."""
    chosen = []
    for _ in range(num_steps):
        has_drafts = policy.choose_most([gain] * size) > 0
        chosen.append(has_drafts)
        policy.note_step(size, has_drafts, 0.01 * cost if has_drafts else 0.01)
    return chosen


@pytest.mark.parametrize(
    ("gain", "cost", "pays"),
    [(3, 1.2, True), (1.1, 1.5, False), (1.0, 1.0, True), (None, 9, True)],
)
def test_drafting_is_kept_where_it_pays(gain: float | None, cost: float, pays: bool) -> None:
    chosen = run(DraftPolicy(CONFIG), 1000, gain, cost)
    share = sum(chosen[10:]) / 990
    assert share > 0.98 if pays else share < 0.02


def test_another_text_is_judged_at_once() -> None:
    """Seconds are the machine's and stay known, gains are the text's."""
    policy = DraftPolicy(CONFIG)
    assert sum(run(policy, 200, 3, 1.2)) > 190
    assert sum(run(policy, 100, 1, 1.2)) <= 3
    assert sum(run(policy, 100, 4, 1.2)) >= 97


def test_a_bad_beginning_is_forgiven_soon() -> None:
    """Drafts that fail at a text's start are tried again after few steps, then more seldom."""
    policy = DraftPolicy(CONFIG)
    run(policy, 50, 3, 1.9)
    tries = [i for i, is_draft in enumerate(run(policy, 200, 1.5, 1.9)) if is_draft]
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert gaps == sorted(gaps)
    assert tries[0] <= 8
    assert gaps[-1] == STEPS_BETWEEN_TRIES + 1
    assert len(tries) <= 6


def test_seconds_may_change() -> None:
    policy = DraftPolicy(CONFIG)
    assert sum(run(policy, 100, 2, 3)) < 10
    assert sum(run(policy, 40 * STEPS_BETWEEN_TRIES, 2, 1.2)[-200:]) > 190


def test_sequences_of_which_nothing_is_known_do_not_vote() -> None:
    policy = DraftPolicy(CONFIG)
    run(policy, 8, 1.5, 2)
    assert policy.choose_most([1.1, None, None]) == 0
    assert policy.choose_most([3.0, None, 1.2]) == 4
    assert policy.choose_most([None, None]) == 4


def test_batches_of_other_sizes_are_judged_by_themselves() -> None:
    policy = DraftPolicy(CONFIG)
    policy.limit({8, 2})
    run(policy, 100, 1.5, 2)
    assert policy.choose_most([1.5]) == policy.choose_most([1.5] * 2) == 0
    run(policy, 20, 1.5, 1, size=5)
    assert policy.choose_most([1.5] * 5) == 4
    assert policy.choose_most([1.5] * 9) == 0


def test_a_step_in_which_a_model_catches_up_is_not_counted() -> None:
    config = EngineConfig(draft="model", num_drafts=4)
    policy, was_plain, chosen = DraftPolicy(config), True, []
    for _ in range(300):
        has_drafts = policy.choose_most([3]) > 0
        policy.note_step(1, has_drafts, 0.5 if has_drafts and was_plain else 0.01)
        was_plain = not has_drafts
        chosen.append(has_drafts)
    assert sum(chosen[20:]) > 270


def test_without_adaptation_drafts_are_always_made() -> None:
    policy = DraftPolicy(EngineConfig(draft="ngram", adapt_drafts=False))
    assert all(run(policy, 50, 1, 9))
    assert DraftPolicy(EngineConfig()).choose_most([None]) == 0


def yielded(num_tokens: int, num_drafted: int, num_accepted: int) -> SequenceOutput:
    return SequenceOutput((5,) * num_tokens, num_drafted=num_drafted, num_accepted=num_accepted)


def learned(policy: DraftPolicy) -> DraftPolicy:
    """Returns the policy after steps in which drafts that bring 1.5 tokens a step pay."""
    for has_drafts in (False, True) * 3:
        policy.note_step(1, has_drafts, 0.012 if has_drafts else 0.01)
    return policy


def test_each_sequence_is_judged_by_its_own_drafts() -> None:
    """All or none where drafts cost the same however many they are."""
    policy = learned(DraftPolicy(CONFIG))
    for _ in range(9):
        policy.note_output("good", 4, yielded(3, 4, 2))
        policy.note_output("bad", 4, yielded(1, 4, 0))
        policy.note_output("plain", 0, yielded(1, 0, 0))
    assert policy.choose(["good"]) == [4]
    assert policy.choose(["bad"]) == [0]
    assert policy.choose(["plain"]) == policy.choose(["new"]) == [4]
    assert policy.choose(["bad", "good", "plain"]) == [4, 4, 4]
    policy.forget("bad")
    assert policy.choose(["bad"]) == [4]
    assert policy.num_known == 2


def test_the_newest_calls_weigh_most_in_a_gain() -> None:
    """One call of 5 tokens a step is worth 7 of 1, where 1.2 are needed: 1 + 0.8 * 0.8 ** 7."""
    policy = learned(DraftPolicy(CONFIG))
    for _ in range(50):
        policy.note_output("a", 4, yielded(1, 4, 0))
    assert policy.choose(["a"]) == [0]
    policy.note_output("a", 4, yielded(5, 4, 4))
    chosen = []
    for _ in range(9):
        chosen += policy.choose(["a"])
        policy.note_output("a", 4, yielded(1, 4, 0))
    assert chosen == [4] * 7 + [0] * 2
    # A call that was read after its sequence had ended on the device tells nothing.
    policy.note_output("b", 4, yielded(0, 0, 0))
    assert policy.choose(["b"]) == [4]


@pytest.mark.parametrize("draft", ["model", "layers"])
def test_a_sequence_is_asked_for_as_many_drafts_as_were_right(draft: str) -> None:
    num_layers = 1 if draft == "layers" else 0
    config = EngineConfig(draft=draft, num_draft_layers=num_layers, num_drafts=4)
    policy = learned(DraftPolicy(config))
    policy.note_output("b", 4, yielded(5, 4, 4))
    asked = []
    for _ in range(6):
        policy.note_output("a", 4, yielded(1, 4, 0))
        # Beside another that pays for both.
        asked.append(policy.choose(["a", "b"]))
        policy.note_output("b", 4, yielded(5, 4, 4))
    assert asked == [[number, 4] for number in (3, 2, 1, 0, 0, 0)]
    for _ in range(TOKENS_WITHOUT_DRAFTS - 1):
        policy.note_output("a", 0, yielded(1, 0, 0))
    assert policy.choose(["a", "b"]) == [0, 4]
    policy.note_output("a", 0, yielded(1, 0, 0))
    assert policy.choose(["a", "b"]) == [1, 4]
    policy.note_output("a", 1, yielded(2, 1, 1))
    assert policy.choose(["a", "b"]) == [3, 4]
    policy.note_output("a", 3, yielded(4, 3, 3))
    assert policy.choose(["a", "b"]) == [4, 4]


def test_without_adaptation_bad_drafts_are_no_fewer() -> None:
    policy = DraftPolicy(EngineConfig(draft="model", num_drafts=4, adapt_drafts=False))
    for _ in range(9):
        policy.note_output("a", 4, yielded(1, 4, 0))
    assert policy.choose(["a"]) == [4]


def scheduled(slot: int, **changes: Any) -> ScheduledSequence:
    request = make_request("a", 3, 9)
    values: dict[str, Any] = {"start": 3, "num_tokens": 1, "page_ids": (0,), "samples": True}
    return ScheduledSequence(request, 0, slot, slot, **(values | changes))


def test_only_calls_of_decodes_that_yield_something_are_measured() -> None:
    """Six steps are learned from, plain ones first; others leave the choice as it was."""
    policy = DraftPolicy(CONFIG)
    decode, chunk = scheduled(0), scheduled(1, token_ids=(4,))
    for schedule, num_tokens in (
        (Schedule(decodes=(decode,), chunks=(chunk,)), 1),
        (Schedule(chunks=(chunk,)), 1),
        (Schedule(decodes=(decode,)), 0),
    ):
        everyone = (*schedule.decodes, *schedule.chunks)
        output = StepOutput(tuple(yielded(num_tokens, 0, 0) for _ in everyone))
        policy.note_call(schedule, output, False, 1.0)
        assert policy.choose(["a"]) == [0]
    for has_drafts in (False, True) * 3:
        assert policy.choose(["a"]) == ([4] if has_drafts else [0])
        steps = 2 if has_drafts else 1
        schedule = Schedule(decodes=(decode,), num_steps=steps)
        output = StepOutput((yielded(1, 0, 0),))
        policy.note_call(schedule, output, has_drafts, 0.011 * steps)
    # A step took as long with drafts as without: they pay from 1 token a step on.
    policy.note_output("a", 4, yielded(1, 4, 0))
    assert policy.choose(["a"]) == [4]


def test_nobody_drafts() -> None:
    policy = DraftPolicy(EngineConfig())
    policy.note_output("a", 0, yielded(1, 0, 0))
    assert policy.choose(["a", "b"]) == [0, 0]
    assert policy.num_known == 0
