"""The scheduler against a fake device that has real pages, real slots and a made-up model."""

import hashlib
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxinfer.config import EngineConfig
from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import RequestOutput, Schedule, ScheduledSequence, StepOutput
from jaxinfer.scheduler import Scheduler
from jaxinfer.sequence import Sequence

VOCAB_SIZE = 11
EOS_TOKEN_ID = 0
# Three sequences want up to 72 positions; there are 32, so preemption is the rule.
TIGHT = EngineConfig(
    max_num_seqs=3,
    max_num_batched_tokens=16,
    max_model_len=24,
    page_size=4,
    num_pages=8,
    chunk_tile=8,
)


def make_request(request_id: str, prompt_len: int, max_tokens: int, **fields) -> Request:
    prompt = tuple(1 + (len(request_id) + 7 * i) % (VOCAB_SIZE - 1) for i in range(prompt_len))
    return Request(request_id, prompt, max_tokens, eos_token_ids=(EOS_TOKEN_ID,), **fields)


def next_token(token_ids: list[int]) -> int:
    """The model: any function of all tokens so far."""
    return hashlib.sha256(bytes(token_ids)).digest()[0] % VOCAB_SIZE


def solo(request: Request) -> tuple[tuple[int, ...], FinishReason]:
    token_ids = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        token_ids.append(next_token(token_ids))
        if token_ids[-1] == EOS_TOKEN_ID and not request.ignore_eos:
            return tuple(token_ids[len(request.prompt_token_ids) :]), FinishReason.STOP
    return tuple(token_ids[len(request.prompt_token_ids) :]), FinishReason.LENGTH


class FakeDevice:
    """Runs a schedule when it is dispatched. Checks each as the real step would rely on it.

    A page stores the tokens of its positions, and the model reads them back through the page
    table: a page given to two sequences, or a position left out, changes the output.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pages = [[-1] * config.page_size for _ in range(config.num_pages)]
        self.last_sampled: dict[int, tuple[int, int]] = {}  # slot -> admission, token id
        self.next_starts: dict[int, int] = {}  # admission -> first position not computed

    def run(self, schedule: Schedule) -> StepOutput:
        self.check_rows(schedule)
        for scheduled in schedule.decodes:
            assert len(scheduled.token_ids) == 1
            assert scheduled.samples
            token_id = scheduled.token_ids[0]
            assert self.last_sampled[scheduled.slot] == (scheduled.admission, token_id)
        sampled = []
        for scheduled in (*schedule.decodes, *schedule.chunks):
            known = self.write(scheduled)
            if scheduled.samples:
                token_id = next_token(known)
                self.last_sampled[scheduled.slot] = (scheduled.admission, token_id)
                sampled.append((scheduled.request_id, (token_id,)))
        return StepOutput(tuple(sampled))

    def check_rows(self, schedule: Schedule) -> None:
        assert len(schedule.decodes) <= self.config.max_num_seqs
        tile = self.config.chunk_tile
        num_tiles = sum(-(-len(chunk.token_ids) // tile) for chunk in schedule.chunks)
        assert num_tiles * tile <= self.config.max_num_batched_tokens
        for chunk in schedule.chunks:
            assert chunk.token_ids
            assert chunk.samples or len(chunk.token_ids) % tile == 0
        everyone = (*schedule.decodes, *schedule.chunks)
        for values in (
            [scheduled.request_id for scheduled in everyone],
            [scheduled.slot for scheduled in everyone],
            [page_id for scheduled in everyone for page_id in scheduled.page_ids],
        ):
            assert len(set(values)) == len(values), f"twice in one step: {values}"

    def write(self, scheduled: ScheduledSequence) -> list[int]:
        """Stores the step's tokens and reads all of the sequence back."""
        assert 0 <= scheduled.slot < self.config.max_num_seqs
        assert scheduled.start == self.next_starts.get(scheduled.admission, 0)
        page_size = self.config.page_size
        end = scheduled.start + len(scheduled.token_ids)
        self.next_starts[scheduled.admission] = end
        assert len(scheduled.page_ids) == -(-end // page_size) <= self.config.max_pages_per_sequence
        for position, token_id in enumerate(scheduled.token_ids, scheduled.start):
            self.pages[scheduled.page_ids[position // page_size]][position % page_size] = token_id
        return [self.pages[scheduled.page_ids[i // page_size]][i % page_size] for i in range(end)]


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
    assert [(d.start, d.token_ids) for d in third.decodes] == [(19, output.token_ids)]
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


def test_rank_alone_decides_who_is_served_and_who_is_preempted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any fixed order must do: this is what priorities will rely on."""
    monkeypatch.setattr(Sequence, "rank", property(lambda s: -len(s.request.request_id)))
    scheduler, device = Scheduler(TIGHT), FakeDevice(TIGHT)
    # Every other prompt needs two steps, and pages that those that decode have taken meanwhile.
    requests = [make_request("x" * i, 11 if i % 2 else 19, 5, ignore_eos=True) for i in range(1, 9)]
    outputs: dict[str, tuple[int, ...]] = {}
    arriving = deque(requests)
    for _ in range(100):
        if arriving:
            scheduler.add(arriving.popleft())
        schedule = scheduler.schedule()
        for output in scheduler.update(schedule, device.run(schedule)):
            outputs[output.request_id] = outputs.get(output.request_id, ()) + output.token_ids
        scheduler.check_integrity()
    assert not scheduler.has_unfinished
    assert outputs == {request.request_id: solo(request)[0] for request in requests}
    assert scheduler.stats.num_preemptions >= 3


@pytest.mark.parametrize(("prompt_len", "is_admitted"), [(15, True), (16, False)])
def test_a_prompt_is_admitted_only_with_room_for_the_next_token(
    prompt_len: int, is_admitted: bool
) -> None:
    scheduler = Scheduler(TIGHT)
    scheduler.add(make_request("a", 13, 11))
    scheduler.schedule()
    assert scheduler.stats.num_free_pages == 4
    scheduler.add(make_request("b", prompt_len, 8))
    assert bool(scheduler.schedule()) is is_admitted


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
    step_output = StepOutput((("a", (5, EOS_TOKEN_ID, 6)), ("b", (5, 6, 7, 8))))
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
        output = scheduler.abort(request_id)
        assert output is not None
        assert output.finish_reason is FinishReason.ABORT
        assert output.num_prompt_tokens == 20
        assert scheduler.abort(request_id) is None
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


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go and run in any order, with up to two steps dispatched and not yet read."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(TIGHT)
        self.device = FakeDevice(TIGHT)
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.in_flight: deque[tuple[Schedule, StepOutput]] = deque()
        self.num_added = 0
        self.last_admitted = 0

    @rule(
        prompt_len=st.integers(1, TIGHT.max_model_len - 1),
        max_tokens=st.integers(1, TIGHT.max_model_len - 1),
        ignore_eos=st.booleans(),
    )
    def add(self, prompt_len: int, max_tokens: int, ignore_eos: bool) -> None:
        self.num_added += 1
        request = make_request(
            str(self.num_added),
            prompt_len,
            min(max_tokens, TIGHT.max_model_len - prompt_len),
            ignore_eos=ignore_eos,
        )
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = ()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        request = self.requests.pop(request_id)
        output = self.scheduler.abort(request_id)
        assert output is not None
        assert output.num_output_tokens == len(self.outputs[request_id])
        assert solo(request)[0][: output.num_output_tokens] == self.outputs[request_id]

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule()
    def dispatch(self) -> None:
        schedule = self.scheduler.schedule()
        assert schedule or self.in_flight or not self.requests, "requests, and nothing to run"
        for chunk in schedule.chunks:
            arrival = int(chunk.request_id)
            if chunk.start == 0 and arrival > self.last_admitted:
                passed_over = set(map(str, range(self.last_admitted + 1, arrival)))
                assert not passed_over & self.requests.keys(), "not first come, first served"
                self.last_admitted = arrival
        self.in_flight.append((schedule, self.device.run(schedule)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def read(self) -> None:
        for output in self.scheduler.update(*self.in_flight.popleft()):
            request = self.requests[output.request_id]
            self.outputs[output.request_id] += output.token_ids
            so_far = self.outputs[output.request_id]
            assert output.num_output_tokens == len(so_far)
            token_ids, reason = solo(request)
            assert so_far == token_ids[: len(so_far)]
            assert output.finish_reason == (reason if so_far == token_ids else None)
            if output.finish_reason:
                del self.requests[output.request_id]

    @rule(num_steps=st.integers(1, 12))
    def run_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            while self.in_flight:
                self.read()
            self.dispatch()

    @invariant()
    def books_agree(self) -> None:
        self.scheduler.check_integrity()
        stats = self.scheduler.stats
        assert stats.num_waiting + stats.num_running == len(self.requests)
        assert stats.num_running <= TIGHT.max_num_seqs

    def teardown(self) -> None:
        """Whatever state the rules have led to, every request left finishes from there."""
        while self.in_flight:
            self.read()
        # Alone, each would need at most one step a token for prompt and output.
        for _ in range(TIGHT.max_model_len * len(self.requests)):
            if not self.scheduler.has_unfinished:
                break
            self.dispatch()
            self.read()
        assert not self.requests
        assert not self.scheduler.has_unfinished
        self.scheduler.check_integrity()
        assert self.scheduler.stats.num_free_pages == TIGHT.num_pages


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=40)
