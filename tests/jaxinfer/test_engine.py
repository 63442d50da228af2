"""The engine on tiny random models: losslessness, preemption, compilation, borders."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxinfer.engine import Engine, check_parameters
from jaxinfer.request import FinishReason, Request
from tests.jaxinfer.tiny import (
    CPU_DTYPES,
    make_engine,
    random_parameters,
    random_request,
    run_all,
    tiny_config,
    tiny_model,
)


@functools.cache
def shared_engine() -> Engine:
    """Compiled once for this file; every test leaves it idle."""
    return make_engine()


def mixed_requests() -> list[Request]:
    """16 requests, greedy and seeded, short and longer than a step."""
    samplings = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.2, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.7},
    ]
    return [
        random_request(f"r{i}", 3 + 11 * i % 90, 5 + i % 20, seed=i, **samplings[i % 4])
        for i in range(16)
    ]


@functools.cache
def solo_outputs() -> dict[str, list[int]]:
    """Every request on its own."""
    return {
        request.request_id: run_all(shared_engine(), [request])[request.request_id]
        for request in mixed_requests()
    }


def test_a_batch_equals_solo_runs() -> None:
    assert run_all(shared_engine(), mixed_requests()) == solo_outputs()
    assert shared_engine().stats.num_free_pages == tiny_config().num_pages


def test_preemption_does_not_change_outputs() -> None:
    """Pages for about one and a half of sixteen sequences."""
    engine = make_engine(tiny_config(num_pages=20, max_model_len=128))
    assert run_all(engine, mixed_requests()) == solo_outputs()
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_free_pages == 20


def test_chunk_and_step_sizes_do_not_change_outputs() -> None:
    engine = make_engine(tiny_config(max_num_batched_tokens=16, max_num_seqs=3))
    assert run_all(engine, mixed_requests()) == solo_outputs()


def test_a_seed_decides_a_sampled_output() -> None:
    request = random_request("a", 20, 30, seed=5, temperature=1.0)
    other = dataclasses.replace(
        request, sampling=dataclasses.replace(request.sampling, seed=6), request_id="b"
    )
    high_word = dataclasses.replace(
        request, sampling=dataclasses.replace(request.sampling, seed=5 + 2**32), request_id="c"
    )
    outputs = run_all(shared_engine(), [request, other, high_word])
    assert outputs["a"] == run_all(shared_engine(), [request])["a"]
    assert len({tuple(tokens) for tokens in outputs.values()}) == 3


def test_nothing_compiles_after_compile() -> None:
    engine = shared_engine()
    run_all(engine, mixed_requests()[:1])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if "compile" in event else None
    )
    try:
        run_all(engine, mixed_requests())
        during_requests = list(compiled)
        jax.jit(lambda x: x * 3)(1.0)  # the listener does hear a compilation
    finally:
        jax.monitoring.clear_event_listeners()
    assert during_requests == []
    assert compiled


def test_time_in_the_queue_is_reported() -> None:
    engine = make_engine(tiny_config(max_num_seqs=1))
    for name in "abc":
        engine.add(random_request(name, 10, 3, seed=0))
    waited: dict[str, float | None] = {}
    while engine.has_unfinished:
        waited |= {output.request_id: output.queue_seconds for output in engine.step()}
    a, b, c = (waited[name] or 0.0 for name in "abc")
    assert 0 < a < b < c
    assert not engine._added_times
    assert not engine._queue_seconds


def test_at_most_ten_programs() -> None:
    for seqs in (1, 8, 9, 64, 256):
        for tokens in (16, 64, 512, 8192):
            engine = Engine(
                tiny_model(),
                tiny_config(max_num_seqs=seqs, max_num_batched_tokens=tokens),
                CPU_DTYPES,
                shared_engine().mesh,
            )
            assert 1 <= engine.num_programs <= 10


def test_the_state_is_donated() -> None:
    engine = shared_engine()
    for program in engine._programs.values():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= engine.kv_cache_bytes
        assert memory.temp_size_in_bytes < engine.kv_cache_bytes + 2**20


def test_eos_ends_and_is_reported() -> None:
    request = random_request("a", 10, 40, seed=1)
    tokens = run_all(shared_engine(), [request])["a"]
    eos = tokens[5]
    stopping = dataclasses.replace(request, ignore_eos=False, eos_token_ids=(eos,))
    engine = shared_engine()
    engine.add(stopping)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [t for output in outputs for t in output.token_ids] == tokens[: tokens.index(eos) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_abort_frees_pages_and_leaves_others_alone() -> None:
    engine = shared_engine()
    requests = mixed_requests()[:6]
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for number in range(200):
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
        if number == 2:
            engine.abort("r1")
            engine.abort("r4")
            engine.abort("nobody")
    assert not engine.has_unfinished
    assert engine.stats.num_free_pages == engine.stats.num_pages
    for name in ("r0", "r2", "r3", "r5"):
        assert outputs[name] == solo_outputs()[name]


def test_the_longest_sequence_fits_exactly() -> None:
    config = tiny_config(num_pages=16)
    engine = make_engine(config)
    request = random_request("a", 100, 28, seed=3)
    assert len(run_all(engine, [request])["a"]) == 28


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_tokens": 125}, "max_model_len"),
        ({"prompt_token_ids": (1, 96)}, "96"),
        ({"prompt_token_ids": (-1,)}, "-1"),
    ],
)
def test_impossible_requests_are_refused(changes: dict, match: str) -> None:
    request = dataclasses.replace(random_request("a", 10, 5, seed=0), **changes)
    with pytest.raises(ValueError, match=match):
        shared_engine().add(request)
    assert not shared_engine().has_unfinished


def test_score_is_the_likelihood_of_the_text() -> None:
    """Against the probabilities of one whole prompt at a time."""
    engine = shared_engine()
    tokens = random_request("a", 100, 1, seed=9).prompt_token_ids
    losses = engine.score(tokens)
    assert losses.shape == (99,)
    # Greedy's own continuation has a lower loss than any other token in its place.
    greedy = run_all(engine, [dataclasses.replace(random_request("b", 40, 1, seed=9))])["b"][0]
    others = [engine.score((*tokens[:40], token))[-1] for token in range(engine.model.vocab_size)]
    assert int(np.argmin(others)) == greedy
    assert np.exp(-np.asarray(others, np.float64)).sum() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_array_equal(losses[:39], engine.score(tokens[:40]))


def test_score_checks_its_window() -> None:
    for size in (1, 129):
        with pytest.raises(ValueError, match=str(size)):
            shared_engine().score([1] * size)


def test_parameters_are_checked() -> None:
    model = tiny_model()
    wanted = shared_engine().abstract_parameters
    parameters = random_parameters(model)
    check_parameters(wanted, parameters)
    with pytest.raises(ValueError, match=r"norm.*missing"):
        check_parameters(wanted, {k: v for k, v in parameters.items() if k != "norm"})
    with pytest.raises(ValueError, match=r"no parameter.*extra"):
        check_parameters(wanted, parameters | {"extra": parameters["norm"]})
    with pytest.raises(ValueError, match=r"norm.*wants"):
        check_parameters(wanted, parameters | {"norm": parameters["norm"][1:]})
