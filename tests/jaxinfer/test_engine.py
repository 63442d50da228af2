"""The engine on tiny random models: losslessness, preemption, compilation, borders."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxinfer.engine import Engine, check_parameters
from jaxinfer.request import FinishReason, Request
from tests.jaxinfer.tiny import (
    largest_shape,
    make_engine,
    random_parameters,
    random_request,
    run_all,
    tiny_config,
    tiny_model,
    tiny_spec,
)


@functools.cache
def shared_engine() -> Engine:
    """Compiled once for this file; every test leaves it idle."""
    return make_engine()


@functools.cache
def plain_engine() -> Engine:
    """Has one program, and is for tests of other files."""
    return make_engine(pick_shapes=largest_shape)


@functools.cache
def small_engine() -> Engine:
    """Has pages for one sequence of the longest."""
    return make_engine(tiny_config(num_pages=16), pick_shapes=largest_shape)


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
        request.request_id: run_all(plain_engine(), [request])[request.request_id]
        for request in mixed_requests()
    }


def test_a_batch_equals_solo_runs() -> None:
    assert run_all(shared_engine(), mixed_requests()) == solo_outputs()
    assert shared_engine().stats.num_free_pages == tiny_config().num_pages


def test_preemption_does_not_change_outputs() -> None:
    """All requests at once want more than ten times the pages there are."""
    engine = small_engine()
    again = [dataclasses.replace(r, request_id=f"{r.request_id}+") for r in mixed_requests()]
    requests = mixed_requests() + again
    lengths = [len(request.prompt_token_ids) + request.max_tokens for request in requests]
    assert sum(-(-length // 8) for length in lengths) >= 10 * 16
    outputs = run_all(engine, requests)
    assert {name.rstrip("+"): tokens for name, tokens in outputs.items()} == solo_outputs()
    assert all(outputs[f"{name}+"] == tokens for name, tokens in solo_outputs().items())
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_free_pages == 16
    assert engine.stats.num_cached_pages > 0


@pytest.mark.thorough("more sizes of steps")
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
    engine = make_engine(tiny_config(max_num_seqs=1), pick_shapes=largest_shape)
    for name in "abc":
        engine.add(random_request(name, 10, 3, seed=0))
    waited: dict[str, float | None] = {}
    while engine.has_unfinished:
        waited |= {output.request_id: output.queue_seconds for output in engine.step()}
    a, b, c = (waited[name] or 0.0 for name in "abc")
    assert 0 < a < b < c


def test_at_most_ten_programs() -> None:
    for seqs in (1, 8, 9, 64, 256):
        for tokens in (16, 64, 512, 8192):
            engine = Engine(
                tiny_spec(tiny_config(max_num_seqs=seqs, max_num_batched_tokens=tokens))
            )
            assert 1 <= len(engine.shapes) <= 10


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
    request = random_request("a", 100, 28, seed=3)
    assert len(run_all(small_engine(), [request])["a"]) == 28


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


def test_each_call_is_sent_before_the_one_before_it_is_read() -> None:
    engine = shared_engine()
    before = engine.host_seconds
    engine.add(random_request("a", 5, 6, seed=2))
    outputs, ahead = [], []
    while engine.has_unfinished:
        outputs += engine.step()
        after = engine.host_seconds
        ahead.append((after["sent"] - before["sent"]) - (after["read"] - before["read"]))
    assert sum(len(output.token_ids) for output in outputs) == 6
    # max_tokens is known beforehand: nothing is sent in vain.
    assert ahead == [1, 1, 1, 1, 1, 1, 0]
    assert engine.host_seconds["sent"] - before["sent"] == 6


def test_an_end_that_is_read_late_costs_one_call() -> None:
    engine = shared_engine()
    request = random_request("a", 10, 40, seed=1)
    tokens = run_all(engine, [request])["a"]
    place = tokens.index(tokens[5])
    before = engine.host_seconds["sent"]
    stopping = dataclasses.replace(request, stop_token_ids=(tokens[5],))
    assert run_all(engine, [stopping])["a"] == tokens[: place + 1]
    assert engine.host_seconds["sent"] - before <= place + 2


@pytest.mark.parametrize("changes", [{"steps_ahead": 0}, {"steps_ahead": 2}])
def test_how_far_ahead_does_not_matter(changes: dict) -> None:
    engine = make_engine(tiny_config(**changes))
    assert run_all(engine, mixed_requests()) == solo_outputs()


def test_several_steps_in_one_call_give_the_same_tokens() -> None:
    engine = make_engine(tiny_config(max_steps_per_call=4))
    assert run_all(engine, mixed_requests()) == solo_outputs()
    request = random_request("a", 10, 40, seed=1)
    before = engine.host_seconds["sent"]
    tokens = run_all(engine, [request])["a"]
    assert tokens == run_all(shared_engine(), [request])["a"]
    assert engine.host_seconds["sent"] - before == 1 + 10  # 39 tokens, 4 at a time

    # The device itself notices a stop token, and leaves the row alone.
    stopping = dataclasses.replace(request, stop_token_ids=(tokens[6],))
    outputs = []
    engine.add(stopping)
    while engine.has_unfinished:
        outputs += engine.step()
    assert [t for output in outputs for t in output.token_ids] == tokens[
        : tokens.index(tokens[6]) + 1
    ]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_many_threads_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "5")
    with pytest.warns(RuntimeWarning, match="XLA has 5 threads"):
        Engine(tiny_spec())
    Engine(tiny_spec(tiny_config(batch_invariant=False)))


def test_one_program_is_enough() -> None:
    model = tiny_model()
    engine = Engine(tiny_spec(tiny_config(), model))
    with pytest.raises(ValueError, match=r"no shape of .* has room"):
        engine.compile(shapes=engine.shapes[:1])
    engine.compile(shapes=engine.shapes[-1:])
    engine.start(jax.device_put(random_parameters(model)))
    assert run_all(engine, mixed_requests()) == solo_outputs()


@pytest.mark.thorough("more sizes of steps")
def test_no_step_is_larger_than_what_was_compiled() -> None:
    """Two small programs also serve more and longer requests than they hold at once."""
    model = tiny_model()
    engine = Engine(tiny_spec(tiny_config(max_num_seqs=16), model))
    small = [shape for shape in engine.shapes if shape.num_decodes == 8 and shape.num_tiles <= 1]
    assert small[-1].num_tiles < engine.shapes[-1].num_tiles
    engine.compile(shapes=small)
    engine.start(jax.device_put(random_parameters(model)))
    assert run_all(engine, mixed_requests()) == solo_outputs()


def test_prefix_cache_changes_nothing_but_the_work() -> None:
    prefix = random_request("p", 70, 1, seed=77).prompt_token_ids
    requests = [
        dataclasses.replace(request, prompt_token_ids=prefix + request.prompt_token_ids[:20])
        for request in mixed_requests()
    ]
    without = make_engine(tiny_config(prefix_cache=False))
    wanted = run_all(without, requests)
    assert without.stats.num_cached_tokens == 0
    engine = make_engine(tiny_config())
    assert {r.request_id: run_all(engine, [r])[r.request_id] for r in requests} == wanted
    assert engine.stats.num_cached_tokens >= 15 * 64
    assert run_all(engine, requests) == wanted
    # With penalties the tokens that pass through no chunk count as well.
    penalised = [
        dataclasses.replace(
            request,
            sampling=dataclasses.replace(
                request.sampling,
                repetition_penalty=1.5,
                frequency_penalty=0.7,
                presence_penalty=-0.4,
            ),
        )
        for request in requests
    ]
    assert run_all(engine, penalised) == run_all(without, penalised) != wanted


def choices_of(engine: Engine, request: Request) -> dict[int, list[int]]:
    engine.add(request)
    outputs: dict[int, list[int]] = {choice: [] for choice in range(request.n)}
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.choice] += output.token_ids
    return outputs


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_choices_share_pages_and_differ(prefix_cache: bool) -> None:
    engine = make_engine(tiny_config(prefix_cache=prefix_cache))
    request = random_request("a", 60, 12, seed=3, temperature=1.0)
    choices = choices_of(engine, dataclasses.replace(request, n=6))
    assert choices[0] == run_all(engine, [request])["a"]
    assert len({tuple(tokens) for tokens in choices.values()}) == 6
    assert all(len(tokens) == 12 for tokens in choices.values())
    # Whole pages of 8: 56 of 60 tokens, for the five that came later.
    assert engine.stats.num_cached_tokens >= 5 * 56
    assert engine.stats.num_free_pages == engine.stats.num_pages
    assert choices_of(shared_engine(), dataclasses.replace(request, n=6)) == choices


def test_logprobs_are_those_of_the_model() -> None:
    engine = shared_engine()
    request = dataclasses.replace(
        random_request("a", 40, 8, seed=9, temperature=1.0, repetition_penalty=1.3),
        logprobs=20,
        prompt_logprobs=3,
    )
    engine.add(request)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    tokens = [t for output in outputs for t in output.token_ids]
    assert tokens == run_all(engine, [dataclasses.replace(request, logprobs=None)])["a"]
    entries = [entry for output in outputs for entry in output.logprobs]
    assert [entry.token_id for entry in entries] == tokens
    prompt = outputs[0].prompt_logprobs
    assert len(prompt) == 40
    assert prompt[0] is None
    assert [entry.token_id for entry in prompt[1:] if entry] == list(request.prompt_token_ids[1:])
    for entry in (*prompt[1:], *entries):
        assert entry is not None
        values = [value for _, value in entry.top]
        assert len(values) == (20 if entry in entries else 3)
        assert values == sorted(values, reverse=True)
        assert (entry.rank <= len(values)) == (entry.token_id in dict(entry.top))
        if entry.token_id in dict(entry.top):
            assert dict(entry.top)[entry.token_id] == entry.logprob
    # What a token cost as output, it costs as a prompt.
    longer = dataclasses.replace(
        request, prompt_token_ids=(*request.prompt_token_ids, *tokens), prompt_logprobs=20
    )
    engine.add(longer)
    again = []
    while engine.has_unfinished:
        again += engine.step()
    scored = again[0].prompt_logprobs
    np.testing.assert_allclose(
        [entry.logprob for entry in scored[40:] if entry],
        [entry.logprob for entry in entries],
        atol=1e-5,
    )
    assert scored[1:40] == tuple(
        dataclasses.replace(new, top=new.top) for new in scored[1:40] if new
    )
    assert [e.logprob for e in scored[1:40] if e] == [e.logprob for e in prompt[1:] if e]


def test_logprobs_sum_to_one() -> None:
    engine = shared_engine()
    prompt = random_request("a", 30, 1, seed=4).prompt_token_ids
    total = 0.0
    for token in range(96):
        engine.add(Request("a", (*prompt, token), max_tokens=1, prompt_logprobs=0))
        while engine.has_unfinished:
            for output in engine.step():
                entry = output.prompt_logprobs[-1]
                assert entry is not None
                total += np.exp(entry.logprob)
    assert total == pytest.approx(1.0, abs=1e-5)


def test_bias_and_min_tokens_decide() -> None:
    engine = shared_engine()
    request = random_request("a", 10, 12, seed=1, logit_bias=((7, 100.0),))
    assert run_all(engine, [request])["a"] == [7] * 12
    # The slot's next request has no bias.
    plain = random_request("a", 10, 12, seed=1)
    tokens = run_all(engine, [plain])["a"]
    assert tokens != [7] * 12
    stopping = dataclasses.replace(plain, stop_token_ids=(tokens[2],), min_tokens=8)
    stopped = run_all(engine, [stopping])["a"]
    assert len(stopped) >= 8
    assert tokens[2] not in stopped[:8]
