"""The scheduler against a fake device that has real pages, real slots and a made-up model."""

import dataclasses
from collections import deque

import pytest

from jaxinfer import prefix_cache
from jaxinfer.config import EngineConfig
from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import RequestOutput, Schedule, SequenceOutput, StepOutput
from jaxinfer.scheduler import Scheduler
from jaxinfer.sequence import Sequence
from tests.jaxinfer.fake_device import EOS_TOKEN_ID, TIGHT, FakeDevice, make_request, solo


def run_to_the_end(scheduler: Scheduler, device: FakeDevice) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while scheduler.has_unfinished:
        schedule = scheduler.schedule()
        assert schedule, "unfinished requests and nothing to run"
        for output in scheduler.update(schedule, device.run(schedule)):
            outputs.setdefault(output.request_id, []).append(output)
        scheduler.check_integrity()
    return outputs


def joined(outputs: list[RequestOutput]) -> tuple[tuple[int, ...], FinishReason | None]:
    token_ids = tuple(token_id for output in outputs for token_id in output.token_ids)
    return token_ids, outputs[-1].finish_reason


def test_one_request_prefills_in_whole_tiles_then_decodes() -> None:
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    request = make_request("a", prompt_len=19, max_tokens=3, ignore_eos=True)
    scheduler.add(request)

    first = scheduler.schedule()
    assert [(c.start, len(c.token_ids), c.samples) for c in first.chunks] == [(0, 16, False)]
    assert scheduler.update(first, device.run(first)) == []
    second = scheduler.schedule()
    assert [(c.start, len(c.token_ids), c.samples) for c in second.chunks] == [(16, 3, True)]
    (output,) = scheduler.update(second, device.run(second))
    assert output == RequestOutput(
        "a", solo(request)[0][:1], num_prompt_tokens=19, num_output_tokens=1
    )
    third = scheduler.schedule()
    assert not third.chunks
    assert [(d.start, d.num_tokens) for d in third.decodes] == [(19, 1)]
    scheduler.update(third, device.run(third))

    (last,) = run_to_the_end(scheduler, device)["a"]
    assert last.finish_reason is FinishReason.LENGTH
    assert last.num_output_tokens == 3
    assert scheduler.stats.num_free_pages == TIGHT.num_pages
    assert not scheduler.schedule()


def test_a_last_prompt_token_alone_is_a_chunk() -> None:
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    scheduler.add(make_request("a", prompt_len=17, max_tokens=1))
    schedule = scheduler.schedule()
    scheduler.update(schedule, device.run(schedule))
    schedule = scheduler.schedule()
    assert not schedule.decodes
    assert [c.start for c in schedule.chunks] == [16]


def test_chunks_and_decodes_share_a_step_and_chunks_take_whole_tiles() -> None:
    config = EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64, num_pages=64, chunk_tile=8
    )
    scheduler, device = Scheduler(config), FakeDevice(config)
    scheduler.add(make_request("a", 2, 9, ignore_eos=True))
    schedule = scheduler.schedule()
    scheduler.update(schedule, device.run(schedule))
    for request_id, prompt_len in (("b", 9), ("c", 20), ("d", 1)):
        scheduler.add(make_request(request_id, prompt_len, 9, ignore_eos=True))

    schedule = scheduler.schedule()
    assert [s.request_id for s in schedule.decodes] == ["a"]
    # 9 tokens of b take two of the three tiles; c gets the last, d waits although it is short.
    assert [(c.request_id, len(c.token_ids)) for c in schedule.chunks] == [("b", 9), ("c", 8)]
    scheduler.update(schedule, device.run(schedule))
    schedule = scheduler.schedule()
    assert [s.request_id for s in schedule.decodes] == ["a", "b"]
    assert [(c.request_id, len(c.token_ids)) for c in schedule.chunks] == [("c", 12), ("d", 1)]


def test_a_step_is_not_mostly_padding() -> None:
    """Steps of 1, 2 and 8 tiles are compiled: 3 are brought as 2 and 1, 4 in one that holds 8."""
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, chunk_tile=8)
    assert config.tile_counts == (1, 2, 8)
    for prompt_len, sizes in ((24, [16, 8]), (32, [32]), (9, [9]), (70, [64, 6])):
        scheduler, device = Scheduler(config), FakeDevice(config)
        scheduler.add(make_request("a", prompt_len, 1))
        brought = []
        while scheduler.has_unfinished:
            schedule = scheduler.schedule()
            brought += [chunk.num_tokens for chunk in schedule.chunks]
            scheduler.update(schedule, device.run(schedule))
        assert brought == sizes


def test_preempted_sequences_come_back_and_their_output_is_unaffected() -> None:
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    requests = [make_request("x" * i, 5 + i % 3, 17 - i % 3, ignore_eos=True) for i in range(1, 9)]
    for request in requests:
        scheduler.add(request)
    outputs = run_to_the_end(scheduler, device)
    for request in requests:
        assert joined(outputs[request.request_id]) == solo(request)
    assert scheduler.stats.num_preemptions >= 5
    assert scheduler.stats.num_preemptions == sum(
        outputs[request.request_id][-1].num_preemptions for request in requests
    )
    assert scheduler.stats.num_output_tokens == sum(request.max_tokens for request in requests)
    assert scheduler.stats.num_prompt_tokens == sum(len(r.prompt_token_ids) for r in requests)
    # The oldest of those that run is never the one to give its pages up.
    assert outputs["x"][-1].num_preemptions == 0


def test_priority_decides_who_is_served_and_who_is_preempted() -> None:
    """Every other prompt needs two calls, and pages that those that decode have taken meanwhile."""
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    requests = [
        make_request("x" * i, 11 if i % 2 else 19, 5, ignore_eos=True, priority=i)
        for i in range(1, 9)
    ]
    outputs: dict[str, tuple[int, ...]] = {}
    finished = []
    arriving = deque(requests)
    for _ in range(100):
        if arriving:
            scheduler.add(arriving.popleft())
        schedule = scheduler.schedule()
        for output in scheduler.update(schedule, device.run(schedule)):
            outputs[output.request_id] = outputs.get(output.request_id, ()) + output.token_ids
            if output.finish_reason:
                finished.append(output.request_id)
        scheduler.check_integrity()
    assert not scheduler.has_unfinished
    assert outputs == {request.request_id: solo(request)[0] for request in requests}
    assert scheduler.stats.num_preemptions >= 3
    # The last to come, of the highest priority, overtakes those that still wait.
    assert finished.index("x" * 8) < 5
    assert finished[-1] in ("x", "xx", "xxx")


def test_waiting_outweighs_priority_in_the_end() -> None:
    """A level is worth ten seconds: what has waited longer goes first."""
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    for name, seconds, priority in (
        ("first", 0.0, 0),
        ("urgent at 9", 9.0, 1),
        ("urgent at 11", 11.0, 1),
        ("low at 0", 0.0, -1),
    ):
        scheduler.add(make_request(name, 20, 4, ignore_eos=True, priority=priority), seconds)
    order = list(run_to_the_end(scheduler, device))
    assert order == ["urgent at 9", "first", "urgent at 11", "low at 0"]


@pytest.mark.parametrize(("prompt_len", "is_admitted"), [(15, True), (16, False)])
def test_a_prompt_is_admitted_only_with_room_for_the_next_token(
    prompt_len: int, is_admitted: bool
) -> None:
    scheduler = Scheduler(TIGHT)
    scheduler.add(make_request("a", 13, 11))
    scheduler.schedule()
    assert scheduler.stats.num_free_pages == 4
    scheduler.add(make_request("another", prompt_len, 8))
    assert bool(scheduler.schedule().chunks) is is_admitted


def test_end_of_sequence_token_is_kept_and_ends_the_request() -> None:
    request = next(
        request
        for request in (make_request("e" * n, 3, 20) for n in range(1, 99))
        if solo(request)[1] is FinishReason.STOP and len(solo(request)[0]) > 2
    )
    scheduler = Scheduler(TIGHT)
    scheduler.add(request)
    outputs = run_to_the_end(scheduler, FakeDevice(TIGHT))[request.request_id]
    assert joined(outputs) == solo(request)
    assert outputs[-1].token_ids == (EOS_TOKEN_ID,)


def test_tokens_after_the_one_that_ends_the_request_are_dropped() -> None:
    scheduler = Scheduler(TIGHT)
    for request_id in "ab":
        scheduler.add(make_request(request_id, 2, 3))
    schedule = scheduler.schedule()
    step_output = StepOutput((SequenceOutput((5, EOS_TOKEN_ID, 6)), SequenceOutput((5, 6, 7, 8))))
    stopped, full = scheduler.update(schedule, step_output)
    assert (stopped.token_ids, stopped.finish_reason) == ((5, EOS_TOKEN_ID), FinishReason.STOP)
    assert (full.token_ids, full.finish_reason) == ((5, 6, 7), FinishReason.LENGTH)
    assert scheduler.stats.num_output_tokens == 5
    assert not scheduler.has_unfinished


def test_abort_gives_back_at_once_and_a_second_one_does_nothing() -> None:
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    for request_id in ("runs", "waits"):
        scheduler.add(make_request(request_id, 20, 4))
    schedule = scheduler.schedule()
    for request_id in ("waits", "runs"):
        (output,) = scheduler.abort(request_id)
        assert output.finish_reason is FinishReason.ABORT
        assert output.num_prompt_tokens == 20
        assert scheduler.abort(request_id) == []
        scheduler.check_integrity()
    assert scheduler.stats.num_free_pages == TIGHT.num_pages
    assert not scheduler.has_unfinished
    assert scheduler.update(schedule, device.run(schedule)) == []


def test_late_output_of_an_earlier_request_with_the_same_id_is_ignored() -> None:
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    scheduler.add(make_request("a", 3, 4))
    late = scheduler.schedule()
    late_output = device.run(late)
    scheduler.abort("a")
    request = make_request("a", 5, 4, ignore_eos=True)
    scheduler.add(request)
    schedule = scheduler.schedule()
    assert scheduler.update(late, late_output) == []
    outputs = scheduler.update(schedule, device.run(schedule))
    outputs += run_to_the_end(scheduler, device)["a"]
    assert joined(outputs) == solo(request)


def test_add_refuses_an_id_in_use_and_a_request_that_can_never_fit() -> None:
    scheduler = Scheduler(TIGHT)
    scheduler.add(make_request("a", 2, 2))
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        scheduler.add(make_request("a", 2, 2))
    with pytest.raises(ValueError, match=r"is 25, more than max_model_len \(24\)"):
        scheduler.add(make_request("b", 20, 5))
    assert scheduler.stats.num_waiting == 1


ROOMY = EngineConfig(
    max_num_seqs=8,
    max_num_batched_tokens=32,
    max_model_len=64,
    page_size=4,
    num_pages=64,
    chunk_tile=8,
)


def test_a_prompt_is_found_from_the_next_call_on() -> None:
    scheduler, device = Scheduler(ROOMY), FakeDevice(ROOMY)
    prompt = tuple(1 + i % 10 for i in range(16))
    for name in ("a", "b"):
        scheduler.add(Request(name, prompt, 9, ignore_eos=True))
    first = scheduler.schedule()
    # Both in one call: nothing is found yet.
    assert [chunk.start for chunk in first.chunks] == [0, 0]
    scheduler.add(Request("c", prompt, 9, ignore_eos=True))
    scheduler.add(Request("d", (*prompt, 5), 9, ignore_eos=True))
    scheduler.add(Request("e", (*prompt[:9], 7), 9, ignore_eos=True))
    second = scheduler.schedule()
    # Whole pages, and never the last token.
    assert [(c.request_id, c.start) for c in second.chunks] == [("c", 12), ("d", 16), ("e", 8)]
    first_pages = first.chunks[0].page_ids
    assert [c.page_ids[: c.start // 4] for c in second.chunks] == [
        first_pages[:3],
        first_pages,
        first_pages[:2],
    ]
    for schedule in (first, second):
        scheduler.update(schedule, device.run(schedule))
    outputs = run_to_the_end(scheduler, device)
    assert [outputs[name][-1].num_cached_tokens for name in "abcde"] == [0, 0, 12, 16, 8]
    assert scheduler.stats.num_cached_tokens == 36
    # Also pages of outputs can be found: a conversation goes on.
    answer = solo(Request("a", prompt, 9, ignore_eos=True))[0]
    scheduler.add(Request("f", (*prompt, *answer, 3), 2))
    assert scheduler.schedule().chunks[0].start == 24


@pytest.mark.parametrize("max_steps_per_call", [1, 4])
def test_the_page_that_a_stop_token_fills_is_not_found(max_steps_per_call: int) -> None:
    """The device ends the sequence there: nobody computes the last token's keys and values."""
    config = EngineConfig(**{**vars(ROOMY), "max_steps_per_call": max_steps_per_call})
    scheduler, device = Scheduler(config), FakeDevice(config)
    plain = make_request("abc", 5, 30, ignore_eos=True)
    answer = solo(plain)[0]
    size = next(n for n in (11, 7, 3) if answer[n - 1] not in answer[: n - 1])
    request = dataclasses.replace(plain, stop_token_ids=(answer[size - 1],))
    scheduler.add(request)
    in_flight: deque[tuple[Schedule, StepOutput]] = deque()
    while scheduler.has_unfinished:
        schedule = scheduler.schedule()
        in_flight.append((schedule, device.run(schedule)))
        if len(in_flight) > 1:
            scheduler.update(*in_flight.popleft())
    known = (*request.prompt_token_ids, *answer[:size])
    assert len(known) % 4 == 0
    scheduler.add(Request("next", (*known, 5, 6), 1))
    schedule = scheduler.schedule()
    # All pages of the output but the last one, though calls ran ahead.
    assert schedule.chunks[0].start == len(known) - 4
    device.run(schedule)


def test_salts_do_not_share_and_one_request_shares_with_itself() -> None:
    for prefix_cache_on in (True, False):
        config = EngineConfig(**{**vars(ROOMY), "prefix_cache": prefix_cache_on})
        scheduler, device = Scheduler(config), FakeDevice(config)
        prompt = tuple(1 + i % 10 for i in range(17))
        found = []
        for name, salt in (("a", ""), ("b", "secret"), ("c", ""), ("d", "secret")):
            scheduler.add(Request(name, prompt, 3, cache_salt=salt, n=3))
            outputs = run_to_the_end(scheduler, device)[name]
            found.append([o.num_cached_tokens for o in outputs if o.finish_reason])
        first, again = sorted(found[0]), 3 * [16 if prefix_cache_on else 0]
        assert first == sorted(found[1]) == [0, 16, 16]
        assert sorted(found[2]) == sorted(found[3]) == (again if prefix_cache_on else [0, 16, 16])


def test_equal_digests_do_not_make_equal_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the hash broken, tokens would still be compared."""
    monkeypatch.setattr(prefix_cache, "_sha256", lambda data: b"always the same")
    scheduler, device = Scheduler(ROOMY), FakeDevice(ROOMY)
    requests = [make_request("x" * i, 12, 6, ignore_eos=True) for i in range(1, 5)]
    for request in requests:
        scheduler.add(request)
        outputs = run_to_the_end(scheduler, device)
        assert joined(outputs[request.request_id]) == solo(request)


def test_the_least_recently_freed_pages_are_given_away_first() -> None:
    """Empty ones before them, and the end of a prompt before its beginning."""
    config = EngineConfig(**{**vars(ROOMY), "num_pages": 16})
    scheduler, device = Scheduler(config), FakeDevice(config)

    def run(name: str, prompt: tuple[int, ...]) -> None:
        scheduler.add(Request(name, prompt, 1))
        run_to_the_end(scheduler, device)

    def num_found(prompt: tuple[int, ...]) -> int:
        sequence = Sequence(Request("", prompt, 1), 0, (0.0, 0, 0), "shared:")
        return len(scheduler.prefix_cache.find(sequence))

    prompts = {name: (1 + i,) * 20 for i, name in enumerate("abc")}
    for name, prompt in prompts.items():
        run(name, prompt)
    run("a again", prompts["a"])
    assert scheduler.stats.num_cached_pages == 15
    # Six pages: the empty one, the last of a (not used again), and the last four of b.
    run("d", tuple(1 + i % 7 for i in range(24)))
    assert [num_found(prompts[name]) for name in "abc"] == [4, 1, 4]


def test_choices_wait_for_the_first_ones_prompt() -> None:
    scheduler, device = Scheduler(ROOMY), FakeDevice(ROOMY)
    request = make_request("a", 50, 5, ignore_eos=True, n=3)
    scheduler.add(request)
    assert scheduler.stats.num_waiting == 3
    in_flight = [scheduler.schedule() for _ in range(3)]
    brought = [[(c.choice, c.start, c.num_tokens) for c in s.chunks] for s in in_flight]
    assert brought == [[(0, 0, 32)], [(0, 32, 18)], [(1, 48, 2), (2, 48, 2)]]
    outputs: list[RequestOutput] = []
    for schedule in in_flight:
        outputs += scheduler.update(schedule, device.run(schedule))
    outputs += run_to_the_end(scheduler, device)["a"]
    for choice in range(3):
        assert joined([o for o in outputs if o.choice == choice]) == solo(request, choice)
    assert scheduler.stats.num_prompt_tokens == 150


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_choices_go_on_without_the_first_one(how: str) -> None:
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    request = make_request("a", 20, 4, ignore_eos=True, n=2)
    scheduler.add(request)
    schedule = scheduler.schedule()
    scheduler.update(schedule, device.run(schedule))
    assert scheduler.stats.num_waiting == 1
    if how == "abort":
        (ended,) = scheduler.abort("a", 0)
        assert ended.choice == 0
        assert scheduler.is_live("a")
    else:
        scheduler._preempt(scheduler._running[-1])
    outputs = run_to_the_end(scheduler, device)["a"]
    assert joined([o for o in outputs if o.choice == 1]) == solo(request, 1)
    assert not scheduler.is_live("a")


def test_prompt_logprobs_are_whole_and_come_once() -> None:
    scheduler, device = Scheduler(ROOMY), FakeDevice(ROOMY)
    request = make_request("a", 50, 3, ignore_eos=True, prompt_logprobs=0, logprobs=2, n=2)
    for _ in range(2):  # the second time all of it is in the cache, and computed all the same
        scheduler.add(request)
        for _ in range(2):
            schedule = scheduler.schedule()
            scheduler.update(schedule, device.run(schedule))
        scheduler._preempt(next(s for s in scheduler._running if s.choice == 0))
        outputs = run_to_the_end(scheduler, device)["a"]
        scored = [o for o in outputs if o.prompt_logprobs]
        assert [o.choice for o in scored] in ([0], [])
    # Preempted before its first output was read: what was collected before is not repeated.
    scheduler.add(request)
    schedule = scheduler.schedule()
    scheduler.update(schedule, device.run(schedule))
    scheduler._preempt(scheduler._running[0])
    (output,) = (o for o in run_to_the_end(scheduler, device)["a"] if o.prompt_logprobs)
    first, *others = output.prompt_logprobs
    assert first is None
    assert [entry.token_id for entry in others if entry] == list(request.prompt_token_ids[1:])
    assert [entry.logprob for entry in others if entry] == [-i / 7 for i in range(1, 50)]


def test_calls_ahead_never_sample_in_vain_but_behind_a_stop() -> None:
    config = EngineConfig(**{**vars(ROOMY), "max_steps_per_call": 4})
    scheduler, device = Scheduler(config), FakeDevice(config)
    request = make_request("a", 5, 11, ignore_eos=True)
    scheduler.add(request)
    schedules = [scheduler.schedule() for _ in range(6)]
    sizes = [[(d.start, d.num_tokens) for d in schedule.decodes] for schedule in schedules]
    assert sizes == [[], [(5, 4)], [(9, 4)], [(13, 2)], [], []]
    outputs: list[RequestOutput] = []
    for schedule in schedules:
        outputs += scheduler.update(schedule, device.run(schedule))
    assert joined(outputs) == solo(request)
    # While anyone waits, one step a call.
    for number in range(9):
        scheduler.add(make_request("b" * (1 + number), 5, 9, ignore_eos=True))
    while scheduler.stats.num_waiting:
        schedule = scheduler.schedule()
        assert schedule.num_steps == 1
        scheduler.update(schedule, device.run(schedule))
    run_to_the_end(scheduler, device)


def test_ten_times_the_pages_are_asked_for() -> None:
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    requests = [make_request("x" * (1 + i), 1 + i % 11, 13, ignore_eos=True) for i in range(18)]
    demand = sum(-(-(len(r.prompt_token_ids) + r.max_tokens) // 4) for r in requests)
    assert demand >= 10 * TIGHT.num_pages
    for request in requests:
        scheduler.add(request)
    outputs = run_to_the_end(scheduler, device)
    for request in requests:
        assert joined(outputs[request.request_id]) == solo(request)
    assert scheduler.stats.num_preemptions > 0
