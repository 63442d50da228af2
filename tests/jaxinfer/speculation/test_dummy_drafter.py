"""A drafter is a file and a line: this file is one, and it changes no token.

It repeats the last token of the text, which is right where a text repeats itself.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

from jaxinfer.batch import Batch
from jaxinfer.config import EngineConfig
from jaxinfer.drafters import DRAFTERS, DrafterTraits
from jaxinfer.engine import Engine
from jaxinfer.request import SamplingParams
from jaxinfer.speculation.drafter import TargetAndDraft
from jaxinfer.speculation.drafts import Drafts, Wanted, found_drafts
from jaxinfer.step_state import StepState
from tests.jaxinfer.test_engine import mixed_requests, plain_engine, solo_outputs
from tests.jaxinfer.tiny import (
    few_shapes,
    make_engine,
    random_request,
    run_all,
    tiny_config,
)
from tests.thorough import thorough_beyond


class Drafter:
    """Drafts the last token of each text, as often as is wanted."""

    def __init__(self, models: TargetAndDraft, config: EngineConfig) -> None:
        vocab_size = models.target.model.vocab_size
        self._vocab_size = vocab_size if config.verify == "rejection" else None

    def catch_up(self, state: StepState, batch: Batch, wanted: Wanted) -> StepState:
        return state

    def propose(self, state: StepState, batch: Batch, wanted: Wanted) -> tuple[Drafts, StepState]:
        slots, lens = batch.decode_slots, wanted.lens
        last = state.tokens.at[slots, lens].get(mode="fill", fill_value=0)
        drafts = jnp.repeat(last[:, None], wanted.max_drafts, axis=1)
        repeated = Drafts(drafts, wanted.num_drafts)
        return found_drafts(state, slots, lens, repeated, self._vocab_size)

    def read_chunks(self, state: StepState, batch: Batch) -> StepState:
        return state


@pytest.fixture(params=[False, True], ids=["all or none", "each by itself"])
def drafter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Adds the one line to the table; returns the drafter's name."""
    monkeypatch.setitem(DRAFTERS, "last", DrafterTraits(__name__, costs_each=request.param))
    return "last"


def drafting(**changes: Any) -> Engine:
    values = {"num_drafts": 3, "adapt_drafts": False} | changes
    return make_engine(tiny_config(**values), pick_shapes=few_shapes)


@pytest.mark.parametrize(
    "changes",
    thorough_beyond(
        [{}],
        [{}, {"max_steps_per_call": 4, "steps_ahead": 2}, {"adapt_drafts": True}],
        "more ways to draft",
    ),
)
def test_greedy_and_seeded_tokens_are_those_of_plain_decoding(
    drafter: str, changes: dict[str, Any]
) -> None:
    engine = drafting(draft=drafter, **changes)
    assert run_all(engine, mixed_requests()) == solo_outputs()
    # Again from the prefix cache.
    again = [dataclasses.replace(r, request_id=f"{r.request_id}+") for r in mixed_requests()]
    outputs = run_all(engine, again)
    assert {name.rstrip("+"): tokens for name, tokens in outputs.items()} == solo_outputs()
    assert engine.stats.num_drafted_tokens > engine.stats.num_accepted_tokens
    assert engine.stats.num_free_pages == engine.stats.num_pages


@pytest.mark.parametrize(
    "verify", thorough_beyond(["exact"], ["exact", "rejection"], "more ways to draft")
)
def test_right_drafts_are_accepted(drafter: str, verify: str) -> None:
    """A bias makes the model say the same token for ever."""
    engine = drafting(draft=drafter, verify=verify)
    sampling = SamplingParams(logit_bias=((3, 100.0),))
    request = dataclasses.replace(random_request("a", 6, 40, seed=1), sampling=sampling)
    assert run_all(engine, [request])["a"] == run_all(plain_engine(), [request])["a"] == [3] * 40
    assert engine.stats.num_drafted_tokens == engine.stats.num_accepted_tokens > 25


def test_others_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="one of ngram, layers, model, got 'last'"):
        EngineConfig(draft="last")
