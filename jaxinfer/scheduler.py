"""Decides which sequences run in a step and how many tokens each of them brings.

Host only: never imports JAX, knows neither model nor device. There is no prefill phase and no
decode phase, only one subtraction: ``num_tokens - num_computed_tokens``.
"""

from bisect import bisect_left, insort
from collections import deque
from itertools import chain, count
from operator import attrgetter

from jaxinfer.config import EngineConfig
from jaxinfer.page_pool import PagePool
from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import (
    EngineStats,
    RequestOutput,
    Schedule,
    ScheduledSequence,
    StepOutput,
)
from jaxinfer.sequence import Sequence

_rank = attrgetter("rank")


class Scheduler:
    """Owns the sequences, the slots and the page pool. Not thread-safe.

        add -> waiting --admit--> running --update--> finished
                  ^----preempt------'

    ``schedule`` gives each running sequence ``min(num_tokens - num_computed_tokens, budget)``,
    decodes before chunks, then admits waiting ones while slots, pages and budget last. If a page
    is missing, the running sequence of the highest ``rank`` is preempted: its pages are freed and
    its tokens kept, to be computed again as chunks.

    The budget is in rows. Each decode has its own row, at most ``max_num_seqs`` in all, outside
    of ``max_num_batched_tokens``; a chunk takes whole tiles of ``chunk_tile`` rows, and only a
    chunk that brings the last known token may leave a tile partly empty.

    Why it never stalls: the first in rank can preempt all others, and the pool holds
    ``max_model_len`` tokens; so the first in rank brings tokens in every step until it finishes.

    ``num_computed_tokens`` moves when a step is scheduled, not when it is read. A step may thus
    be dispatched before the one before it is read, and ``update`` drops what comes late for a
    sequence that was aborted, finished or preempted in between. Its pages can be given away at
    once: the device runs steps in order, so the new holder's writes come after the late ones.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.page_pool = PagePool(config.num_pages, config.page_size)
        self._live: dict[str, Sequence] = {}
        # Both sorted by rank, and every sequence that lives is in exactly one of them.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._arrivals = count()
        self._admissions = count()
        self._num_prompt_tokens = 0
        self._num_chunk_tokens = 0
        self._num_output_tokens = 0
        self._num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._live)

    @property
    def stats(self) -> EngineStats:
        """A snapshot. A prompt is counted when its first new token is known."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_pages=self.page_pool.num_pages,
            num_free_pages=self.page_pool.num_free,
            num_prompt_tokens=self._num_prompt_tokens,
            num_chunk_tokens=self._num_chunk_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=self._num_preemptions,
        )

    def add(self, request: Request) -> None:
        """Lets a request wait. ``ValueError`` if its id is in use or it can never fit."""
        if request.request_id in self._live:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        request.check_length(self.config.max_model_len)
        sequence = Sequence(request, next(self._arrivals))
        self._live[request.request_id] = sequence
        insort(self._waiting, sequence, key=_rank)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once; its last output, or ``None`` if there is no such request."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return None
        self._end(sequence)
        return _output(sequence, (), FinishReason.ABORT)

    def schedule(self) -> Schedule:
        """Plans the next step and takes pages for the positions it computes."""
        decoding = [s for s in self._running if s.is_decoding]
        prefilling = deque(s for s in self._running if not s.is_decoding)
        num_tiles = self.config.max_num_batched_tokens // self.config.chunk_tile

        decodes = [s for s in decoding if self._make_room(s, 1)]
        chunks: dict[Sequence, int] = {}
        while num_tiles:
            sequence = prefilling.popleft() if prefilling else self._admit()
            if sequence is None:
                break
            num_new_tokens = self._chunk_len(sequence, num_tiles)
            if num_new_tokens and self._make_room(sequence, num_new_tokens):
                chunks[sequence] = num_new_tokens
                num_tiles -= -(-num_new_tokens // self.config.chunk_tile)

        self._num_chunk_tokens += sum(chunks.values())
        # Room for a chunk may have been made by preempting a decode of higher rank, planned
        # above, but never a chunk: these are planned in order of rank.
        return Schedule(
            decodes=tuple(_advance(s, 1) for s in decodes if s.is_running),
            chunks=tuple(_advance(s, num_new_tokens) for s, num_new_tokens in chunks.items()),
        )

    def update(self, schedule: Schedule, step_output: StepOutput) -> list[RequestOutput]:
        """Takes in what a step of ``schedule`` yielded; one output for each sequence it changed.

        Steps are read in the order in which they were scheduled.
        """
        new_token_ids = dict(step_output.token_ids)
        outputs = []
        for scheduled in chain(schedule.decodes, schedule.chunks):
            sequence = self._live.get(scheduled.request_id)
            # Late: the request is gone, waits again, or has had a slot anew since.
            if sequence is None or sequence.admission != scheduled.admission:
                continue
            if scheduled.samples:
                outputs.append(self._append(sequence, new_token_ids[scheduled.request_id]))
        return outputs

    def check_integrity(self) -> None:
        """Asserts what must hold between any two calls. For tests and idle times."""
        self.page_pool.check_integrity(s.page_ids for s in self._live.values())
        queued = self._waiting + self._running
        assert len(queued) == len(self._live)
        assert set(queued) == set(self._live.values())
        for queue in (self._waiting, self._running):
            ranks = [s.rank for s in queue]
            assert ranks == sorted(ranks), f"queue out of order: {ranks}"
        slots = [s.slot for s in self._running if s.slot is not None] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs)), f"slots {slots}"
        for s in self._waiting:
            assert s.slot is None
            assert not s.page_ids
            assert s.num_computed_tokens == 0
        for s in self._running:
            assert s.is_running
            assert s.num_computed_tokens <= s.num_tokens < self.config.max_model_len
            assert len(s.page_ids) == self.page_pool.num_pages_for(s.num_computed_tokens)

    def _chunk_len(self, sequence: Sequence, num_tiles: int) -> int:
        num_new_tokens = sequence.num_tokens - sequence.num_computed_tokens
        return min(num_new_tokens, num_tiles * self.config.chunk_tile)

    def _make_room(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Takes pages for the next tokens, preempting as needed; False if it was itself."""
        while sequence.is_running:
            num_pages = self.page_pool.num_pages_for(sequence.num_computed_tokens + num_new_tokens)
            page_ids = self.page_pool.allocate(num_pages - len(sequence.page_ids))
            if page_ids is not None:
                sequence.page_ids.extend(page_ids)
                return True
            self._preempt(self._running[-1])
        return False

    def _admit(self) -> Sequence | None:
        """Gives the first waiting sequence a slot, if all its tokens and one more would fit.

        No running sequence still needs pages for its prompt then: a chunk that leaves some of it
        uses up the budget, and nobody is admitted after that. So only growth by decoding leads to
        preemption. A sequence preempted in this step does not fit, as pages ran out without it.
        """
        if not self._waiting or not self._free_slots:
            return None
        sequence = self._waiting[0]
        if self.page_pool.num_pages_for(sequence.num_tokens + 1) > self.page_pool.num_free:
            return None
        del self._waiting[0]
        sequence.slot = self._free_slots.pop()
        sequence.admission = next(self._admissions)
        sequence.num_prefill_tokens = sequence.num_tokens
        insort(self._running, sequence, key=_rank)
        return sequence

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        # Its rank brings it back to the head: whoever waits came later.
        insort(self._waiting, sequence, key=_rank)

    def _append(self, sequence: Sequence, token_ids: tuple[int, ...]) -> RequestOutput:
        """Adds new tokens up to the one that ends the request."""
        request, reason = sequence.request, None
        num_tokens = sequence.num_tokens
        if not sequence.num_output_tokens:
            self._num_prompt_tokens += len(request.prompt_token_ids)
        for token_id in token_ids:
            sequence.token_ids.append(token_id)
            if token_id in request.eos_token_ids and not request.ignore_eos:
                reason = FinishReason.STOP
            elif sequence.num_output_tokens == request.max_tokens:
                reason = FinishReason.LENGTH
            if reason:
                self._end(sequence)
                break
        new_token_ids = tuple(sequence.token_ids[num_tokens:])
        self._num_output_tokens += len(new_token_ids)
        return _output(sequence, new_token_ids, reason)

    def _end(self, sequence: Sequence) -> None:
        """Forgets a request, wherever it is."""
        self._leave(sequence)
        del self._live[sequence.request.request_id]

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of its queue and gives its slot and pages back."""
        queue = self._running if sequence.is_running else self._waiting
        index = bisect_left(queue, sequence.rank, key=_rank)
        assert queue[index] is sequence
        del queue[index]
        self.page_pool.free(sequence.page_ids)
        sequence.page_ids.clear()
        sequence.num_computed_tokens = 0
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
        sequence.slot = sequence.admission = None


def _advance(sequence: Sequence, num_new_tokens: int) -> ScheduledSequence:
    """Counts the next tokens as computed and describes them for the step."""
    assert sequence.slot is not None
    assert sequence.admission is not None
    start = sequence.num_computed_tokens
    sequence.num_computed_tokens += num_new_tokens
    return ScheduledSequence(
        request_id=sequence.request.request_id,
        slot=sequence.slot,
        start=start,
        token_ids=tuple(sequence.token_ids[start : sequence.num_computed_tokens]),
        page_ids=tuple(sequence.page_ids),
        samples=sequence.num_computed_tokens == sequence.num_tokens,
        sampling=sequence.request.sampling,
        admission=sequence.admission,
    )


def _output(
    sequence: Sequence, token_ids: tuple[int, ...], reason: FinishReason | None
) -> RequestOutput:
    return RequestOutput(
        request_id=sequence.request.request_id,
        token_ids=token_ids,
        finish_reason=reason,
        num_prompt_tokens=len(sequence.request.prompt_token_ids),
        num_cached_tokens=sequence.num_cached_tokens,
        num_output_tokens=sequence.num_output_tokens,
        num_preemptions=sequence.num_preemptions,
    )
