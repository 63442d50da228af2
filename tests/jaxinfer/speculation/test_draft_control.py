"""The choice to draft or not, by what drafting brought."""

import itertools

import pytest

from jaxinfer.config import EngineConfig
from jaxinfer.speculation.draft_control import STEPS_BETWEEN_TRIES, DraftControl

CONFIG = EngineConfig(draft="ngram", num_drafts=4, max_draft_seqs=8)


def run(
    control: DraftControl, num_steps: int, gain: float | None, cost: float, size: int = 1
) -> list[bool]:
    """Returns which of the steps had drafts; one with drafts takes ``cost`` times as long."""
    chosen = []
    for _ in range(num_steps):
        has_drafts = control.choose([gain] * size) > 0
        chosen.append(has_drafts)
        control.note(size, has_drafts, 0.01 * cost if has_drafts else 0.01)
    return chosen


@pytest.mark.parametrize(
    ("gain", "cost", "pays"),
    [(3, 1.2, True), (1.1, 1.5, False), (1.0, 1.0, True), (None, 9, True)],
)
def test_drafting_is_kept_where_it_pays(gain: float | None, cost: float, pays: bool) -> None:
    chosen = run(DraftControl(CONFIG, lambda _: 1), 1000, gain, cost)
    share = sum(chosen[10:]) / 990
    assert share > 0.98 if pays else share < 0.02


def test_another_text_is_judged_at_once() -> None:
    """Seconds are the machine's and stay known, gains are the text's."""
    control = DraftControl(CONFIG, lambda _: 1)
    assert sum(run(control, 200, 3, 1.2)) > 190
    assert sum(run(control, 100, 1, 1.2)) <= 3
    assert sum(run(control, 100, 4, 1.2)) >= 97


def test_a_bad_beginning_is_forgiven_soon() -> None:
    """Drafts that fail at a text's start are tried again after few steps, then more seldom."""
    control = DraftControl(CONFIG, lambda _: 1)
    run(control, 50, 3, 1.9)
    tries = [i for i, is_draft in enumerate(run(control, 200, 1.5, 1.9)) if is_draft]
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert gaps == sorted(gaps)
    assert tries[0] <= 8
    assert gaps[-1] == STEPS_BETWEEN_TRIES + 1
    assert len(tries) <= 6


def test_seconds_may_change() -> None:
    control = DraftControl(CONFIG, lambda _: 1)
    assert sum(run(control, 100, 2, 3)) < 10
    assert sum(run(control, 40 * STEPS_BETWEEN_TRIES, 2, 1.2)[-200:]) > 190


def test_sequences_of_which_nothing_is_known_do_not_vote() -> None:
    control = DraftControl(CONFIG, lambda _: 1)
    run(control, 8, 1.5, 2)
    assert control.choose([1.1, None, None]) == 0
    assert control.choose([3.0, None, 1.2]) == 4
    assert control.choose([None, None]) == 4


def test_batches_of_other_sizes_are_judged_by_themselves() -> None:
    control = DraftControl(CONFIG, lambda num_decodes: num_decodes > 2)
    run(control, 100, 1.5, 2)
    assert control.choose([1.5]) == control.choose([1.5] * 2) == 0
    run(control, 20, 1.5, 1, size=5)
    assert control.choose([1.5] * 5) == 4
    assert control.choose([1.5] * 9) == 0


def test_a_step_in_which_a_model_catches_up_is_not_counted() -> None:
    config = EngineConfig(draft="model", num_drafts=4)
    control, was_plain, chosen = DraftControl(config, lambda _: 1), True, []
    for _ in range(300):
        has_drafts = control.choose([3]) > 0
        control.note(1, has_drafts, 0.5 if has_drafts and was_plain else 0.01)
        was_plain = not has_drafts
        chosen.append(has_drafts)
    assert sum(chosen[20:]) > 270


def test_without_adaptation_drafts_are_always_made() -> None:
    control = DraftControl(EngineConfig(draft="ngram", adapt_drafts=False), lambda _: 1)
    assert all(run(control, 50, 1, 9))
    assert DraftControl(EngineConfig(), lambda _: 1).choose([None]) == 0
