"""Whether to guess, decided by what guessing brought."""

import pytest

from jaxinfer.config import EngineConfig
from jaxinfer.draft_control import STEPS_BETWEEN_TRIES, DraftControl

CONFIG = EngineConfig(draft="ngram", num_drafts=4, max_draft_seqs=8)


def run(control: DraftControl, num_steps: int, tokens: float, cost: float) -> list[bool]:
    """Which of the steps had guesses; one with guesses takes ``cost`` times as long."""
    chosen = []
    for _ in range(num_steps):
        has_drafts = control.choose(1) > 0
        chosen.append(has_drafts)
        seconds = 0.01 * cost if has_drafts else 0.01
        control.note(1, has_drafts, tokens if has_drafts else 1, seconds)
    return chosen


@pytest.mark.parametrize(
    ("tokens", "cost", "pays"), [(3, 1.2, True), (1.1, 1.5, False), (1.0, 1.0, True)]
)
def test_guessing_is_kept_where_it_pays(tokens: float, cost: float, pays: bool) -> None:
    chosen = run(DraftControl(CONFIG, lambda _: 1), 1000, tokens, cost)
    share = sum(chosen[10:]) / 990
    assert share > 0.98 if pays else share < 0.02


def test_it_changes_its_mind() -> None:
    control = DraftControl(CONFIG, lambda _: 1)
    assert sum(run(control, 200, 3, 1.2)) > 190
    assert sum(run(control, 400, 1, 1.2)[100:]) < 20
    assert sum(run(control, 20 * STEPS_BETWEEN_TRIES, 4, 1.2)[-200:]) > 190


def test_batches_of_other_sizes_are_judged_by_themselves() -> None:
    control = DraftControl(CONFIG, lambda num_decodes: num_decodes > 2)
    run(control, 100, 1, 2)
    assert control.choose(1) == control.choose(2) == 0
    for _ in range(20):
        has_drafts = control.choose(5) > 0
        control.note(5, has_drafts, 20 if has_drafts else 5, 0.01)
    assert control.choose(5) == 4
    assert control.choose(9) == 0


def test_a_step_in_which_a_model_catches_up_is_not_counted() -> None:
    config = EngineConfig(draft="model", num_drafts=4)
    control, was_plain, chosen = DraftControl(config, lambda _: 1), True, []
    for _ in range(300):
        has_drafts = control.choose(1) > 0
        seconds = 0.5 if has_drafts and was_plain else 0.01
        control.note(1, has_drafts, 3 if has_drafts else 1, seconds)
        was_plain = not has_drafts
        chosen.append(has_drafts)
    assert sum(chosen[20:]) > 270


def test_without_adaptation_guesses_are_always_made() -> None:
    control = DraftControl(EngineConfig(draft="ngram", adapt_drafts=False), lambda _: 1)
    assert all(run(control, 50, 1, 9))
    assert DraftControl(EngineConfig(), lambda _: 1).choose(1) == 0
