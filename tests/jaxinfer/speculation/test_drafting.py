"""A model that drafts: its keys and values, where they lag, and that no token changes."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import pytest

from jaxinfer.config import DraftModel, EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.request import Request, SamplingParams
from jaxinfer.schedule import Schedule
from jaxinfer.scheduler import Scheduler
from jaxinfer.speculation.draft_policy import DraftPolicy
from tests.jaxinfer.fake_device import TIGHT, FakeDevice, make_request, solo
from tests.jaxinfer.test_engine import mixed_requests, plain_engine, solo_outputs
from tests.jaxinfer.tiny import (
    CPU_DTYPES,
    few_shapes,
    random_parameters,
    random_request,
    run_all,
    tiny_config,
    tiny_model,
    tiny_spec,
)
from tests.thorough import thorough_beyond

NUM_DRAFTS = 3
SUBJECT = "more ways to draft"

# Another family, depth, width and number of heads; the vocabulary is the same.
SMALL = tiny_model(
    architecture="qwen2",
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)


def drafting(
    draft: DraftModel | None, draft_parameters: Any = None, parameters: Any = None, **changes: Any
) -> Engine:
    """An engine that always drafts."""
    values = {"num_drafts": NUM_DRAFTS, "adapt_drafts": False} | changes
    values.setdefault("draft", "model" if draft else "layers")
    engine = Engine(tiny_spec(tiny_config(**values), draft=draft))
    engine.compile(shapes=few_shapes(engine))
    if parameters is None:
        parameters = random_parameters(tiny_model())
    engine.start(jax.device_put(parameters), jax.device_put(draft_parameters))
    return engine


def itself(**changes: Any) -> Engine:
    """The target drafts for itself: what is not right is a fault in the draft's pages."""
    model = tiny_model()
    return drafting(DraftModel(model, CPU_DTYPES), random_parameters(model), **changes)


@functools.cache
def shared_itself() -> Engine:
    """Compiled once for this file."""
    return itself()


def smaller(**changes: Any) -> Engine:
    """Drafts that are right now and then: of 96 tokens, by chance."""
    return drafting(DraftModel(SMALL, CPU_DTYPES), random_parameters(SMALL, 3), **changes)


@functools.cache
def shared_smaller() -> Engine:
    """Compiled once for this file."""
    return smaller()


def every(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Only every ``number``-th call of an engine drafts."""
    calls = itertools.count(1)
    monkeypatch.setattr(
        DraftPolicy, "choose_most", lambda *_: 0 if next(calls) % number else NUM_DRAFTS
    )


def counted(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[int]], int, int]:
    """Tokens, and how many were drafted and how many of these rightly."""
    before = engine.stats
    outputs, after = run_all(engine, requests), engine.stats
    return (
        outputs,
        after.num_drafted_tokens - before.num_drafted_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
    )


@pytest.mark.thorough(SUBJECT)
def test_the_target_itself_drafts_rightly_always() -> None:
    """Greedy and seeded, whose noise is the target's; prompts in several chunks."""
    for requests in (mixed_requests(), mixed_requests()[3:4]):
        outputs, drafted, accepted = counted(shared_itself(), requests)
        assert {name: solo_outputs()[name] for name in outputs} == outputs
        assert drafted == accepted > 0


@pytest.mark.thorough(SUBJECT)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_what_it_has_not_read_is_caught_up(
    monkeypatch: pytest.MonkeyPatch, prefix_cache: bool
) -> None:
    """In some calls nobody drafts; pages that only the target has computed are found again."""
    engine = itself(prefix_cache=prefix_cache, max_num_batched_tokens=32)
    request = random_request("a", 90, 38, seed=5)
    plain = run_all(plain_engine(), [request])["a"]
    for name, number in (("a", 7), ("b", 30), ("c", 3), ("d", 1)):
        every(monkeypatch, number)
        outputs, drafted, accepted = counted(
            engine, [dataclasses.replace(request, request_id=name)]
        )
        assert outputs == {name: plain}
        assert drafted == accepted > 0
    assert (engine.stats.num_cached_tokens > 0) == prefix_cache


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_pages_are_known_to_have_the_drafts_part_or_not_to(
    num_drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are computed by both models; what follows by the draft only where it drafts."""
    monkeypatch.setattr(DraftPolicy, "choose_most", lambda *_: num_drafts)
    config = dataclasses.replace(TIGHT, draft="model", num_drafts=3, adapt_drafts=False)
    scheduler, device = Scheduler(config), FakeDevice(config)

    def run(request: Request) -> list[Schedule]:
        scheduler.add(request)
        schedules = []
        while scheduler.has_unfinished:
            schedules.append(scheduler.schedule())
            scheduler.update(schedules[-1], device.run(schedules[-1]))
        return schedules

    request = make_request("a", 9, 10, ignore_eos=True)
    run(request)
    text = (*request.prompt_token_ids, *solo(request)[0])
    assert len(text) == 19
    longer = dataclasses.replace(request, request_id="b", prompt_token_ids=text, max_tokens=5)
    (chunk,) = run(longer)[0].chunks
    assert chunk.start == 16
    assert chunk.num_drafter_kv_tokens == (16 if num_drafts else 8)


@pytest.mark.parametrize(
    "changes",
    thorough_beyond(
        [{}],
        [
            {},
            {"num_drafts": 7, "max_steps_per_call": 4},
            {"steps_ahead": 2, "max_steps_per_call": 3, "max_draft_seqs": 3},
            {"max_num_batched_tokens": 16, "max_num_seqs": 3, "steps_ahead": 0, "num_drafts": 1},
            {"num_pages": 16},
        ],
        SUBJECT,
    ),
)
def test_tokens_are_those_of_plain_decoding(changes: dict[str, Any]) -> None:
    engine = smaller(**changes) if changes else shared_smaller()
    assert run_all(engine, mixed_requests()) == solo_outputs()
    again = [dataclasses.replace(r, request_id=f"{r.request_id}+") for r in mixed_requests()]
    outputs = run_all(engine, again)
    assert {name.rstrip("+"): tokens for name, tokens in outputs.items()} == solo_outputs()
    assert engine.stats.num_free_pages == engine.stats.num_pages
    assert engine.stats.num_drafted_tokens > engine.stats.num_accepted_tokens


@pytest.mark.thorough(SUBJECT)
def test_all_that_changes_logits_changes_drafts_too() -> None:
    """A draft with the same numbers is right whatever a request asks for."""
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.4},
        {"temperature": 1.0, "top_p": 0.6, "frequency_penalty": 0.6},
        {"temperature": 0.5, "min_p": 0.2, "presence_penalty": -0.8},
        {"logit_bias": ((3, 4.0), (8, 4.5)), "repetition_penalty": 1.3},
    ]
    requests = []
    for number, fields in enumerate(samplings):
        request = random_request(f"s{number}", 20, 30, seed=number)
        sampling = SamplingParams(seed=number, **fields)
        requests.append(dataclasses.replace(request, sampling=sampling, min_tokens=9))
    outputs, drafted, accepted = counted(shared_itself(), requests)
    assert outputs == run_all(plain_engine(), requests)
    assert drafted == accepted > 0


@pytest.mark.thorough(SUBJECT)
@pytest.mark.parametrize("size", [90, 100])
def test_another_width_of_the_vocabulary(size: int) -> None:
    """Fillers of a vocabulary are never drafted, and a draft model may lack them."""
    model = dataclasses.replace(SMALL, vocab_size=size)
    engine = drafting(DraftModel(model, CPU_DTYPES), random_parameters(model, 3))
    outputs = run_all(engine, mixed_requests()[:4])
    assert outputs == {name: solo_outputs()[name] for name in outputs}
    assert engine.stats.num_drafted_tokens > 0


@pytest.mark.thorough(SUBJECT)
def test_the_first_layers_draft_rightly_where_the_others_do_nothing() -> None:
    parameters = random_parameters(tiny_model())
    last = parameters["layers"][1]
    silent = parameters | {
        "layers": parameters["layers"] | {1: jax.tree.map(lambda array: array * 0, last)}
    }
    engine = drafting(None, None, silent, num_draft_layers=1)
    plain = Engine(tiny_spec())
    plain.compile(shapes=plain.shapes[-1:])
    plain.start(jax.device_put(silent))
    outputs, drafted, accepted = counted(engine, mixed_requests())
    assert outputs == run_all(plain, mixed_requests())
    assert drafted == accepted > 0


@pytest.mark.thorough(SUBJECT)
def test_the_first_layers_change_no_token() -> None:
    engine = drafting(None, num_draft_layers=1, max_steps_per_call=2)
    assert run_all(engine, mixed_requests()) == solo_outputs()
    assert engine.stats.num_drafted_tokens > engine.stats.num_accepted_tokens > 0


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="one is missing"):
        Engine(tiny_spec(tiny_config(draft="model")))
    with pytest.raises(ValueError, match="one is missing"):
        Engine(tiny_spec(tiny_config(), draft=DraftModel(SMALL, CPU_DTYPES)))
    layers = tiny_config(draft="layers", num_draft_layers=2)
    with pytest.raises(ValueError, match="first 1 at most, got 2"):
        Engine(tiny_spec(layers))
    with pytest.raises(ValueError, match="num_draft_layers must be 1 or more"):
        EngineConfig(draft="layers")
    with pytest.raises(ValueError, match="0 without, got 3 with draft=ngram"):
        EngineConfig(draft="ngram", num_draft_layers=3)
    engine = Engine(tiny_spec(tiny_config(draft="model"), draft=DraftModel(SMALL, CPU_DTYPES)))
    with pytest.raises(ValueError, match="is missing"):
        engine.start(jax.device_put(random_parameters(tiny_model())))


@pytest.mark.thorough(SUBJECT)
def test_right_drafts_are_calls_saved() -> None:
    engine = shared_itself()
    before = dict(engine.host_seconds)
    request = random_request("a", 20, 33, seed=1)
    assert run_all(engine, [request])["a"] == run_all(plain_engine(), [request])["a"]
    sent = engine.host_seconds["sent"] - before.get("sent", 0)
    assert sent <= 3 + 32 // 4  # the prompt, then four tokens a call; one may be in flight in vain


def test_a_step_with_a_draft_model_is_one_program() -> None:
    """Several drafts of one model and their verification by another, in one executable call."""
    engine = shared_smaller()
    before = dict(engine.host_seconds)
    request = random_request("a", 20, 33, seed=1)
    tokens = run_all(engine, [request])["a"]
    assert 0 < engine.host_seconds["sent"] - before.get("sent", 0) <= len(tokens) + 1
    shape = next(shape for shape in engine.programs if shape.num_drafts)
    text = engine.programs[shape].as_text()
    assert text.count("HloModule") == 1
    assert "infeed" not in text
    assert "outfeed" not in text
    assert "callback" not in text


@pytest.mark.thorough(SUBJECT)
def test_a_sequence_has_as_many_drafts_as_were_right() -> None:
    """A good drafter is asked for all, a bad one for few and then seldom."""
    request = random_request("a", 20, 100, seed=1)
    plain = run_all(plain_engine(), [request])["a"]
    drafted = {}
    for name, make in (("good", itself), ("bad", smaller)):
        engine = make(adapt_drafts=True)
        with pytest.MonkeyPatch.context() as patch:
            # Not by the clock.
            patch.setattr(DraftPolicy, "choose_most", lambda *_: NUM_DRAFTS)
            outputs, drafted[name], accepted = counted(engine, [request])
        assert outputs["a"] == plain
        assert (accepted == drafted[name]) == (name == "good")
    # 99 tokens after the prompt's: 3 of 4 were drafted; or some at first, then one in 16 tokens,
    # and as many again because calls run ahead.
    assert drafted["good"] >= 70
    assert drafted["bad"] <= 2 * (3 + 2 + 1 + 99 // 16)
