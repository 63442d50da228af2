"""Drafts that are verified: who drafts, what is accepted, and that no token changes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.batch import BatchShape
from jaxinfer.engine import Engine
from jaxinfer.request import FinishReason, Request, SamplingParams
from jaxinfer.speculation.acceptance import num_accepted
from jaxinfer.speculation.ngram import propose_ngrams
from tests.jaxinfer.test_engine import mixed_requests, plain_engine, solo_outputs
from tests.jaxinfer.tiny import (
    few_shapes,
    make_engine,
    random_request,
    run_all,
    tiny_config,
)
from tests.thorough import thorough_beyond


def lookup(known: list[int], num_drafts: int, max_len: int = 24) -> list[int]:
    """Returns what is drafted after ``known``, beside a row that has something else."""
    rest = [9] * (max_len - len(known))  # what a former occupant left
    tokens = jnp.asarray([[*known, *rest], [5] * max_len])
    drafts, counts = propose_ngrams(tokens, jnp.asarray([len(known), 1]), num_drafts)
    assert counts.tolist()[1] == 0
    return drafts[0].tolist()[: counts.tolist()[0]]


def test_what_came_after_the_last_place_that_looks_alike() -> None:
    assert lookup([1, 2, 3, 4, 5, 6, 1, 2, 3], 3) == [4, 5, 6]
    # The longest first, of these the last.
    assert lookup([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], 2) == [4, 7]
    assert lookup([1, 2, 4, 7, 1, 2, 5, 1, 2], 2) == [5, 1]
    assert lookup([7, 4, 8, 7], 2) == [4, 8]


def test_what_runs_into_the_end_goes_on_in_circles() -> None:
    assert lookup([8, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert lookup([3, 3], 4) == [3, 3, 3, 3]


def test_nothing_is_drafted_where_nothing_looks_alike() -> None:
    assert lookup([1, 2, 3], 4) == []
    assert lookup([1], 4) == []
    assert lookup([9], 4) == []
    # The beginning does not look like the end of the row behind it.
    assert lookup([5, 1, 9], 2) == []


def test_a_full_row() -> None:
    assert lookup([1, 2, *[0] * 20, 1, 2], 3) == [0, 0, 0]


def accept(drafts: list[int], num: int, sampled: list[int], ends: list[int]) -> int:
    is_end = [[i in ends for i in range(len(sampled))]]
    count = num_accepted(
        jnp.asarray([drafts]), jnp.asarray([num]), jnp.asarray([sampled]), jnp.asarray(is_end)
    )
    return count.tolist()[0]


def test_what_the_model_would_have_chosen_is_accepted() -> None:
    assert accept([1, 2, 3], 3, [1, 2, 3, 4], []) == 4
    assert accept([1, 2, 3], 3, [1, 7, 3, 4], []) == 2
    assert accept([1, 2, 3], 3, [7, 2, 3, 4], []) == 1
    # Drafts that were not verified are none.
    assert accept([1, 2, 3], 1, [1, 2, 3, 4], []) == 2
    assert accept([1, 2, 3], 0, [1, 2, 3, 4], []) == 1


def test_nothing_comes_after_an_end() -> None:
    assert accept([1, 2, 3], 3, [1, 2, 3, 4], [1]) == 2
    assert accept([1, 2, 3], 3, [1, 2, 3, 4], [0, 3]) == 1
    assert accept([1, 2, 3], 3, [1, 7, 3, 4], [2]) == 2
    assert accept([1, 2, 3], 3, [1, 7, 3, 4], [1]) == 2


def drafting(**changes: Any) -> Engine:
    """Always drafting, for what is measured would decide otherwise now and then."""
    values = {"draft": "ngram", "num_drafts": 3, "adapt_drafts": False} | changes
    return make_engine(tiny_config(**values), pick_shapes=_shapes)


def _shapes(engine: Engine) -> list[BatchShape]:
    fewest = BatchShape(2, 0, 3)  # eight rows, as many as a plain step has
    return [*few_shapes(engine), *(shape for shape in engine.shapes if shape == fewest)]


# Compiled once for this file.
shared_drafting = functools.cache(drafting)
MANY: dict[str, Any] = {"num_drafts": 7, "max_steps_per_call": 4}


def repeating(name: str, seed: int, max_tokens: int = 40, **changes: Any) -> Request:
    """A prompt in which the same comes again, so that much is drafted, and something rightly."""
    request = random_request(name, 6, max_tokens, seed=seed)
    return dataclasses.replace(request, prompt_token_ids=request.prompt_token_ids * 4, **changes)


@pytest.mark.thorough("more ways to draft")
@pytest.mark.parametrize(
    "changes",
    [
        MANY,
        {"steps_ahead": 2, "max_steps_per_call": 3, "max_draft_seqs": 3},
        {"max_num_batched_tokens": 16, "max_num_seqs": 3, "steps_ahead": 0},
        {"adapt_drafts": True},
    ],
)
def test_tokens_are_those_of_plain_decoding(changes: dict) -> None:
    engine = shared_drafting(**changes)
    assert run_all(engine, mixed_requests()) == solo_outputs()
    assert engine.stats.num_free_pages == engine.stats.num_pages
    assert engine.stats.num_drafted_tokens > 0


def test_tokens_do_not_depend_on_the_batch() -> None:
    engine = shared_drafting()
    assert run_all(engine, mixed_requests()) == solo_outputs()
    for request in mixed_requests():
        assert run_all(engine, [request])[request.request_id] == solo_outputs()[request.request_id]


@pytest.mark.thorough("more ways to draft")
def test_preemption_and_the_prefix_cache_change_nothing() -> None:
    engine = shared_drafting(num_pages=16, **MANY)
    assert run_all(engine, mixed_requests()) == solo_outputs()
    assert engine.stats.num_preemptions > 0
    again = [dataclasses.replace(r, request_id=f"{r.request_id}+") for r in mixed_requests()]
    outputs = run_all(engine, again)
    assert {name.rstrip("+"): tokens for name, tokens in outputs.items()} == solo_outputs()
    assert engine.stats.num_cached_tokens > 0
    assert engine.stats.num_free_pages == 16


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.4},
    {"temperature": 1.0, "top_p": 0.6, "frequency_penalty": 0.6},
    {"temperature": 0.5, "min_p": 0.2, "presence_penalty": -0.8},
    {"logit_bias": ((3, 9.0), (8, 8.5))},
]


def test_all_that_changes_logits_counts_drafts_too() -> None:
    """Penalties, biases, min_tokens, stop tokens and choices, with log-probabilities."""
    requests = []
    for number, fields in enumerate(SAMPLING):
        request = repeating(f"s{number}", number, 30, n=2, min_tokens=9, logprobs=2)
        sampling = SamplingParams(seed=number, **fields)
        stop = (7, 11, 12, 40) if number % 2 else ()
        requests.append(dataclasses.replace(request, sampling=sampling, stop_token_ids=stop))

    def outputs(engine: Engine) -> dict[Any, Any]:
        for request in requests:
            engine.add(request)
        found: dict[Any, Any] = {}
        while engine.has_unfinished:
            for output in engine.step():
                key = output.request_id, output.choice
                tokens, logprobs, _ = found.get(key, ((), (), None))
                found[key] = (
                    tokens + output.token_ids,
                    logprobs + output.logprobs,
                    output.finish_reason,
                )
        return found

    engine = shared_drafting()
    assert outputs(engine) == outputs(plain_engine())
    assert 0 < engine.stats.num_accepted_tokens < engine.stats.num_drafted_tokens


def test_right_drafts_save_steps_and_are_counted() -> None:
    """A bias makes the model say the same token for ever."""
    request = repeating("a", 1)
    sampling = dataclasses.replace(request.sampling, logit_bias=((3, 100.0),))
    request = dataclasses.replace(request, sampling=sampling)
    engine, before = shared_drafting(), shared_drafting().stats.num_accepted_tokens
    num_read = engine.host_seconds.get("read", 0)
    engine.add(request)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == [3] * 40
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[-1].num_drafted_tokens >= outputs[-1].num_accepted_tokens >= 25
    assert engine.stats.num_accepted_tokens - before == outputs[-1].num_accepted_tokens
    # One for the prompt, a few until a draft is right, then four tokens each.
    assert engine.host_seconds["read"] - num_read <= 1 + 4 + 10
    assert max(len(output.token_ids) for output in outputs) == 4


@pytest.mark.parametrize(
    "changes", thorough_beyond([{}], [{}, {"num_pages": 16, **MANY}], "more ways to draft")
)
def test_an_end_within_the_drafts_is_the_end(changes: dict[str, Any]) -> None:
    request = repeating("a", 1)
    sampling = dataclasses.replace(request.sampling, logit_bias=((3, 100.0),))
    stopping = dataclasses.replace(
        request, sampling=sampling, stop_token_ids=(3,), min_tokens=17, max_tokens=40
    )
    plain = run_all(plain_engine(), [stopping])["a"]
    engine = shared_drafting(**changes)
    assert run_all(engine, [stopping])["a"] == plain
    assert engine.stats.num_free_pages == engine.stats.num_pages


@pytest.mark.thorough("more ways to draft")
def test_the_longest_sequence_fits_exactly() -> None:
    engine = shared_drafting(num_pages=16, **MANY)
    request = random_request("a", 100, 28, seed=3)
    assert run_all(engine, [request])["a"] == run_all(plain_engine(), [request])["a"]


def test_a_step_with_drafts_is_one_program_and_compiled_before() -> None:
    engine = shared_drafting()
    shapes = [shape for shape in engine.shapes if shape.num_drafts]
    assert BatchShape(2, 0, 3) in engine.programs
    assert {shape.num_tiles for shape in shapes} == {0, *engine.spec.config.tile_counts}
    compiled: list[str] = []
    before = dict(engine.host_seconds)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if "compile" in event else None
    )
    try:
        tokens = run_all(engine, [repeating("a", 2)])["a"]
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled == []
    # One executable call a step, and nothing beside it.
    assert 0 < engine.host_seconds["sent"] - before.get("sent", 0) <= len(tokens) + 1
    text = engine.programs[BatchShape(2, 0, 3)].as_text()
    assert text.count("HloModule") == 1
    assert "infeed" not in text
    assert "outfeed" not in text
