"""The scheduler under hypothesis: anything may be added, aborted or read late, and pages add up."""

import dataclasses
from collections import deque
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxinfer.config import EngineConfig
from jaxinfer.request import Request
from jaxinfer.schedule import Schedule, StepOutput
from jaxinfer.scheduler import Scheduler
from jaxinfer.speculation.draft_policy import DraftPolicy
from tests.jaxinfer.fake_device import EOS_TOKEN_ID, TIGHT, FakeDevice, make_request, solo


class InTurn(DraftPolicy):
    """Now some drafts, now none: of ``period`` calls in a row those numbered ``drafted``."""

    def __init__(self, config: EngineConfig, period: int, drafted: tuple[int, ...]) -> None:
        super().__init__(config)
        self.config, self.period, self.drafted = config, period, drafted
        self.num_choices = 0

    def choose_most(self, gains: Sequence[float | None]) -> int:
        assert 0 < len(gains) <= self.config.max_num_seqs
        assert all(gain is None or 1 <= gain <= self.config.num_drafts + 1 for gain in gains)
        self.num_choices += 1
        is_drafted = self.num_choices % self.period in self.drafted
        return self.config.num_drafts if is_drafted else 0


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go and run in any order, with calls sent ahead and not yet read."""

    config = TIGHT
    period: int = 1
    drafted: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        policy = InTurn(self.config, self.period, self.drafted)
        self.scheduler = Scheduler(self.config, policy)
        self.device = FakeDevice(self.config)
        self.requests: dict[tuple[str, int], Request] = {}
        self.outputs: dict[tuple[str, int], tuple[int, ...]] = {}
        self.in_flight: deque[tuple[Schedule, StepOutput]] = deque()
        self.num_added = 0

    @rule(
        family=st.integers(1, 3),
        prompt_len=st.integers(1, TIGHT.max_model_len - 1),
        max_tokens=st.integers(1, TIGHT.max_model_len - 1),
        ignore_eos=st.booleans(),
        n=st.sampled_from([1, 1, 2, 4]),
        priority=st.integers(-1, 1),
        cache_salt=st.sampled_from(["", "", "other"]),
        wants_logprobs=st.booleans(),
    )
    def add(
        self,
        family: int,
        prompt_len: int,
        max_tokens: int,
        n: int,
        wants_logprobs: bool,
        **fields: object,
    ) -> None:
        self.num_added += 1
        max_tokens = min(max_tokens, self.config.max_model_len - prompt_len)
        # Few families of prompts, of which one is the beginning of the other.
        prompt = make_request("x" * family, prompt_len, 1).prompt_token_ids
        request = Request(
            str(self.num_added),
            prompt,
            max_tokens,
            eos_token_ids=(EOS_TOKEN_ID,),
            min_tokens=max_tokens // 3,
            n=n,
            logprobs=1 if wants_logprobs else None,
            prompt_logprobs=0 if wants_logprobs else None,
            **fields,  # type: ignore[arg-type]
        )
        self.scheduler.add(request, self.num_added / 2)
        for choice in range(n):
            self.requests[request.request_id, choice] = request
            self.outputs[request.request_id, choice] = ()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), only_one=st.booleans())
    def abort(self, data: st.DataObject, only_one: bool) -> None:
        request_id, choice = data.draw(st.sampled_from(sorted(self.requests)))
        outputs = self.scheduler.abort(request_id, choice if only_one else None)
        for output in outputs:
            key = request_id, output.choice
            request = self.requests.pop(key)
            assert output.num_output_tokens == len(self.outputs[key])
            known = solo(request, output.choice)[0][: output.num_output_tokens]
            assert known == self.outputs[key]
        assert (request_id, choice) not in self.requests
        assert only_one or not self.scheduler.is_live(request_id)

    @precondition(lambda self: len(self.in_flight) < 3)
    @rule()
    def send(self) -> None:
        schedule = self.scheduler.schedule()
        assert schedule or self.in_flight or not self.requests, "requests, and nothing to run"
        self.in_flight.append((schedule, self.device.run(schedule)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def read(self) -> None:
        for output in self.scheduler.update(*self.in_flight.popleft()):
            key = output.request_id, output.choice
            request = self.requests[key]
            is_first = not self.outputs[key]
            self.outputs[key] += output.token_ids
            so_far = self.outputs[key]
            assert output.num_output_tokens == len(so_far)
            token_ids, reason = solo(request, output.choice)
            assert so_far == token_ids[: len(so_far)]
            assert output.finish_reason == (reason if so_far == token_ids else None)
            if request.logprobs is not None:
                assert tuple(e.token_id for e in output.logprobs) == output.token_ids
            is_scored = is_first and output.choice == 0 and request.prompt_logprobs is not None
            wanted = request.prompt_token_ids if is_scored else ()
            assert len(output.prompt_logprobs) == len(wanted)
            assert tuple(e.token_id for e in output.prompt_logprobs if e) == wanted[1:]
            if output.finish_reason:
                del self.requests[key]

    @rule(num_calls=st.integers(1, 12), ahead=st.integers(0, 2))
    def run_calls(self, num_calls: int, ahead: int) -> None:
        for _ in range(num_calls):
            while len(self.in_flight) > ahead:
                self.read()
            self.send()

    @invariant()
    def books_agree(self) -> None:
        self.scheduler.check_integrity()
        stats = self.scheduler.stats
        assert stats.num_waiting + stats.num_running == len(self.requests)
        assert stats.num_running <= self.config.max_num_seqs
        assert stats.num_cached_pages <= stats.num_free_pages

    def teardown(self) -> None:
        """Whatever state the rules have led to, every request left finishes from there."""
        while self.in_flight:
            self.read()
        # Alone, each would need at most one call a token for prompt and output.
        for _ in range(self.config.max_model_len * len(self.requests)):
            if not self.scheduler.has_unfinished:
                break
            self.send()
            self.read()
        assert not self.requests
        assert not self.scheduler.has_unfinished
        assert self.scheduler.draft_policy.num_known == 0, "a sequence that ended is remembered"
        self.scheduler.check_integrity()
        assert self.scheduler.stats.num_free_pages == self.config.num_pages


class SeveralStepsMachine(SchedulerMachine):
    """The same with calls of several steps, and more room so that they occur."""

    config = EngineConfig(
        **{**vars(TIGHT), "max_steps_per_call": 4, "num_pages": 24, "prefix_cache": False}
    )


class DraftsMachine(SchedulerMachine):
    """The same with drafts that are right, wrong and left out, in one step a call or several."""

    config = dataclasses.replace(
        TIGHT, max_steps_per_call=2, num_pages=12, draft="ngram", num_drafts=3
    )
    period, drafted = 4, (1, 2, 3)


class DraftModelMachine(DraftsMachine):
    """The same with a draft model, whose keys and values lag behind now and then."""

    config = dataclasses.replace(
        TIGHT, max_steps_per_call=2, num_pages=12, draft="model", num_drafts=3
    )
    period, drafted = 3, (0,)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40)
TestSeveralStepsMachine = SeveralStepsMachine.TestCase
TestSeveralStepsMachine.settings = settings(max_examples=75, stateful_step_count=40)
TestDraftsMachine = DraftsMachine.TestCase
TestDraftsMachine.settings = settings(max_examples=100, stateful_step_count=40)
TestDraftModelMachine = DraftModelMachine.TestCase
TestDraftModelMachine.settings = settings(max_examples=100, stateful_step_count=40)
