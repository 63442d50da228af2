"""A device with real pages, real slots and a made-up model: what a scheduler's tests run on.

It keeps what the real one keeps (StepState), runs calls in order, and checks what the real one
relies on without being able to.
"""

import hashlib
from dataclasses import dataclass, field

from jaxinfer.config import EngineConfig
from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import (
    Schedule,
    ScheduledSequence,
    SequenceOutput,
    StepOutput,
    TokenLogprobs,
)

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
    """A prompt that its id decides; tokens are 1 to 10, 0 ends a text."""
    prompt = tuple(1 + (len(request_id) + 7 * i) % (VOCAB_SIZE - 1) for i in range(prompt_len))
    return Request(request_id, prompt, max_tokens, eos_token_ids=(EOS_TOKEN_ID,), **fields)


def next_token(request: Request, choice: int, token_ids: list[int]) -> int:
    """The model: any function of all tokens so far; nothing ends before ``min_tokens``."""
    token_id = hashlib.sha256(bytes([choice, *token_ids])).digest()[0] % VOCAB_SIZE
    if len(token_ids) - len(request.prompt_token_ids) < request.min_tokens:
        while token_id in request.ending_token_ids:
            token_id += 1
    return token_id


def solo(request: Request, choice: int = 0) -> tuple[tuple[int, ...], FinishReason]:
    """Returns the tokens that a choice yields on its own, and why it ends."""
    token_ids = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        token_ids.append(next_token(request, choice, token_ids))
        if token_ids[-1] in request.ending_token_ids:
            return tuple(token_ids[len(request.prompt_token_ids) :]), FinishReason.STOP
    return tuple(token_ids[len(request.prompt_token_ids) :]), FinishReason.LENGTH


@dataclass
class Slot:
    """The device's knowledge of the sequence in a slot."""

    admission: int = -1
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    has_ended: bool = False
    draft_len: int = 0


class FakeDevice:
    """Runs a call when it is sent.

    A position of a page stores all tokens up to it, as keys and values depend on them, and a row
    attends only to positions that hold exactly its own beginning: a page given to two sequences,
    found too early or under another salt, or a position left out, fails here.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pages: list[list[tuple[int, ...]]] = [
            [()] * config.page_size for _ in range(config.num_pages)
        ]
        self.salts: list[str | None] = [None] * config.num_pages
        # What a draft model keeps of the same positions; () where it computed on top of nothing.
        self.draft_pages = [list(page) for page in self.pages]
        self.slots = [Slot() for _ in range(config.max_num_seqs)]
        self.num_steps = 0

    def run(self, schedule: Schedule) -> StepOutput:
        """Returns the yield of a call; ``num_steps`` counts those that had a row to compute."""
        self.check_rows(schedule)
        # Pages that this call writes may not be found by it: kernels attend before all is written.
        before = [list(page) for page in self.pages]
        for chunk in schedule.chunks:
            if chunk.is_first:
                self.check_content(before, chunk, list(chunk.cached_token_ids))
        outputs = [self.decode(each, schedule) for each in schedule.decodes]
        outputs += [self.chunk(each) for each in schedule.chunks]
        return StepOutput(tuple(outputs))

    def decode(self, scheduled: ScheduledSequence, schedule: Schedule) -> SequenceOutput:
        slot, num_drafts = self.slots[scheduled.slot], scheduled.num_drafts
        assert num_drafts <= schedule.num_drafts <= self.config.num_drafts
        assert slot.admission == scheduled.admission
        assert 1 <= scheduled.num_tokens <= self.config.max_steps_per_call * (num_drafts + 1)
        new: list[int] = []
        num_drafted = num_steps = 0
        while not slot.has_ended and num_steps < schedule.num_steps:
            if len(new) == scheduled.num_tokens:
                break
            assert slot.num_computed == len(slot.token_ids) - 1
            assert slot.num_computed <= scheduled.start + len(new), "more than the host assumes"
            room = scheduled.num_tokens - len(new) - 1
            drafts = self.draft(scheduled, slot, num_drafts)[:room]
            num_drafted, num_steps = num_drafted + len(drafts), num_steps + 1
            self.write_drafts(scheduled, slot, drafts)
            self.run_draft(scheduled, slot, drafts)
            num_fed = slot.draft_len
            for draft in (*drafts, None):
                self.compute(scheduled, slot)
                new.append(self.sample(scheduled, slot))
                self.num_steps += 1
                if slot.has_ended or new[-1] != draft:
                    break
            slot.draft_len = min(num_fed, slot.num_computed)
        num_accepted = len(new) - num_steps
        return SequenceOutput(
            tuple(new),
            self.logprobs(scheduled, new, num_steps),
            (),
            num_drafted,
            num_accepted,
            slot.draft_len,
        )

    def draft(self, scheduled: ScheduledSequence, slot: Slot, num_drafts: int) -> list[int]:
        """Some right, then some wrong; no more than may come before the last token."""
        request, known = scheduled.request, list(slot.token_ids)
        end = len(request.prompt_token_ids) + request.max_tokens
        drafts: list[int] = []
        num_right = sum(known) % (num_drafts + 1)
        for number in range(min(num_drafts, end - len(known) - 1)):
            token_id = next_token(request, scheduled.choice, known)
            drafts.append(token_id if number < num_right else (token_id + 1) % VOCAB_SIZE)
            known.append(drafts[-1])
        return drafts

    def write_drafts(self, scheduled: ScheduledSequence, slot: Slot, drafts: list[int]) -> None:
        """Wrong ones leave something in the pages too."""
        known = [*slot.token_ids, *drafts]
        for position in range(slot.num_computed + 1, len(known)):
            page_id = scheduled.page_ids[position // self.config.page_size]
            self.pages[page_id][position % self.config.page_size] = tuple(known[: position + 1])

    def run_draft(self, scheduled: ScheduledSequence, slot: Slot, drafts: list[int]) -> None:
        """A draft model catches up, then reads all but the last of its drafts."""
        if not self.config.drafter.has_pages or not drafts:
            return
        known = [*slot.token_ids, *drafts[:-1]]
        self.write_draft(scheduled, known, slot.draft_len)
        slot.draft_len = len(known)
        self.check_draft(scheduled, known)

    def write_draft(self, scheduled: ScheduledSequence, known: list[int], start: int) -> None:
        for position in range(start, len(known)):
            page = self.draft_pages[scheduled.page_ids[position // self.config.page_size]]
            page[position % self.config.page_size] = tuple(known[: position + 1])

    def check_draft(self, scheduled: ScheduledSequence, known: list[int]) -> None:
        for position in range(len(known)):
            page = self.draft_pages[scheduled.page_ids[position // self.config.page_size]]
            assert page[position % self.config.page_size] == tuple(known[: position + 1])

    def chunk_of_draft(self, scheduled: ScheduledSequence, slot: Slot) -> None:
        """A chunk counts for the draft if it follows on what was there."""
        if not self.config.drafter.has_pages:
            return
        if scheduled.is_first:
            slot.draft_len = scheduled.num_drafter_kv_tokens
            self.check_draft(scheduled, slot.token_ids[: slot.draft_len])
        if slot.draft_len == scheduled.start:
            self.write_draft(scheduled, slot.token_ids, scheduled.start)
            slot.draft_len = len(slot.token_ids)
        else:
            for position in range(scheduled.start, len(slot.token_ids)):
                page = self.draft_pages[scheduled.page_ids[position // self.config.page_size]]
                page[position % self.config.page_size] = ()

    def chunk(self, scheduled: ScheduledSequence) -> SequenceOutput:
        slot, end = self.slots[scheduled.slot], scheduled.start + scheduled.num_tokens
        assert len(scheduled.token_ids) == scheduled.num_tokens
        if scheduled.is_first:
            assert len(scheduled.cached_token_ids) == scheduled.start
            assert scheduled.start % self.config.page_size == 0
            slot.admission, slot.has_ended = scheduled.admission, False
            slot.token_ids = list(scheduled.cached_token_ids)
            slot.num_computed = scheduled.start
        assert slot.admission == scheduled.admission
        assert slot.num_computed == len(slot.token_ids) == scheduled.start
        for token_id in scheduled.token_ids:
            slot.token_ids.append(token_id)
            self.compute(scheduled, slot)
        self.chunk_of_draft(scheduled, slot)
        new = [self.sample(scheduled, slot)] if scheduled.samples else []
        prompt = scheduled.request.prompt_token_ids
        assert scheduled.next_token_id == (prompt[end] if end < len(prompt) else 0)
        scored = ()
        if scheduled.request.prompt_logprobs is not None and scheduled.choice == 0:
            scored = tuple(
                TokenLogprobs(prompt[i], -i / 7, 1)
                for i in range(scheduled.start + 1, min(end + 1, len(prompt)))
            )
        logprobs = self.logprobs(scheduled, new)
        return SequenceOutput(tuple(new), logprobs, scored, num_drafter_kv_tokens=slot.draft_len)

    def compute(self, scheduled: ScheduledSequence, slot: Slot) -> None:
        """Writes the next position and attends to all before it."""
        position = slot.num_computed
        slot.num_computed += 1
        page_id = scheduled.page_ids[position // self.config.page_size]
        self.pages[page_id][position % self.config.page_size] = tuple(
            slot.token_ids[: position + 1]
        )
        self.salts[page_id] = scheduled.request.cache_salt
        self.check_content(self.pages, scheduled, slot.token_ids[: position + 1])

    def check_content(
        self, pages: list[list[tuple[int, ...]]], scheduled: ScheduledSequence, tokens: list[int]
    ) -> None:
        for position in range(len(tokens)):
            page_id = scheduled.page_ids[position // self.config.page_size]
            content = pages[page_id][position % self.config.page_size]
            assert content == tuple(tokens[: position + 1]), (position, content, tokens)
            assert self.salts[page_id] == scheduled.request.cache_salt

    def sample(self, scheduled: ScheduledSequence, slot: Slot) -> int:
        request = scheduled.request
        token_id = next_token(request, scheduled.choice, slot.token_ids)
        slot.token_ids.append(token_id)
        num_output_tokens = len(slot.token_ids) - len(request.prompt_token_ids)
        assert num_output_tokens <= request.max_tokens, "sampled in vain"
        slot.has_ended = (
            token_id in request.ending_token_ids or num_output_tokens == request.max_tokens
        )
        return token_id

    def logprobs(
        self, scheduled: ScheduledSequence, new: list[int], num_steps: int = 1
    ) -> tuple[TokenLogprobs, ...]:
        if scheduled.request.logprobs is None:
            return ()
        assert num_steps <= 1, "a call of several steps has no log-probabilities"
        return tuple(TokenLogprobs(token_id, -1.0, 1) for token_id in new)

    def check_rows(self, schedule: Schedule) -> None:
        assert len(schedule.decodes) <= self.config.max_num_seqs
        assert schedule.num_steps == 1 or not schedule.chunks
        tile = self.config.chunk_tile
        num_tiles = sum(-(-len(chunk.token_ids) // tile) for chunk in schedule.chunks)
        assert num_tiles * tile <= self.config.max_num_batched_tokens
        for chunk in schedule.chunks:
            assert chunk.token_ids
            assert chunk.samples or len(chunk.token_ids) % tile == 0
        everyone = (*schedule.decodes, *schedule.chunks)
        slots = [scheduled.slot for scheduled in everyone]
        assert len(set(slots)) == len(slots), f"twice in one call: {slots}"
        page_size = self.config.page_size
        for scheduled in everyone:
            end = scheduled.start + scheduled.num_tokens
            assert len(scheduled.page_ids) >= -(-end // page_size)
            assert self.config.most_drafts or len(scheduled.page_ids) == -(-end // page_size)
            assert len(scheduled.page_ids) <= self.config.max_pages_per_sequence
            first = scheduled.start
            if not scheduled.token_ids:
                first = self.slots[scheduled.slot].num_computed
            written = set(scheduled.page_ids[first // page_size :])
            for other in everyone:
                assert other is scheduled or not written & set(other.page_ids)
