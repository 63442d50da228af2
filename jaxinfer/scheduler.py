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
from jaxinfer.prefix_cache import PrefixCache, chain as chain_digest, root_digest
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
        self._live: dict[tuple[str, int], Sequence] = {}
        self._held: dict[str, list[Sequence]] = {}
        self.cache = PrefixCache()
        self._num_cached_tokens = 0
        self._fresh: list[Sequence] = []
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
            num_cached_tokens=self._num_cached_tokens,
            num_cached_pages=len(self.page_pool._kept),
        )

    def is_live(self, request_id: str) -> bool:
        return any((request_id, c) in self._live for c in range(16))

    def add(self, request: Request, arrival_seconds: float = 0.0) -> None:
        if self.is_live(request.request_id):
            raise ValueError(f"request_id {request.request_id!r} is in use")
        request.check_length(self.config.max_model_len)
        arrival = next(self._arrivals)
        salt = "s" + request.cache_salt if self.config.prefix_cache else f"r{arrival}"
        group = [
            Sequence(request, arrival, c, arrival_seconds, self.config.priority_seconds, salt)
            for c in range(request.n)
        ]
        for q in group:
            self._live[request.request_id, q.choice] = q
        insort(self._waiting, group[0], key=_rank)
        if len(group) > 1:
            self._held[request.request_id] = group[1:]

    def abort(self, request_id: str, choice: int | None = None) -> list[RequestOutput]:
        outputs = []
        for c in range(16) if choice is None else (choice,):
            sequence = self._live.get((request_id, c))
            if sequence is not None:
                self._end(sequence)
                outputs.append(_output(sequence, (), FinishReason.ABORT))
        return outputs

    def _release(self, request_id: str) -> None:
        for q in self._held.pop(request_id, []):
            insort(self._waiting, q, key=_rank)

    def _register(self, sequence: Sequence, limit: int) -> None:
        size = self.config.page_size
        end = min(limit, sequence.num_computed_tokens, sequence.num_tokens)
        while (sequence.num_registered + 1) * size <= end:
            i = sequence.num_registered
            self._digest(sequence, i)
            self.cache.register(
                sequence.digests[i],
                tuple(sequence.token_ids[i * size : (i + 1) * size]),
                sequence.page_ids[i],
            )
            sequence.num_registered += 1

    def _digest(self, sequence: Sequence, page: int) -> bytes:
        size = self.config.page_size
        while len(sequence.digests) <= page:
            i = len(sequence.digests)
            parent = sequence.digests[-1] if i else root_digest(sequence.salt)
            sequence.digests.append(
                chain_digest(parent, sequence.token_ids[i * size : (i + 1) * size])
            )
        return sequence.digests[page]

    def _hits(self, sequence: Sequence) -> list[int]:
        if sequence.request.prompt_logprobs is not None and sequence.choice == 0:
            return []
        size, pages = self.config.page_size, []
        for i in range((sequence.num_tokens - 1) // size):
            page = self.cache.find(
                self._digest(sequence, i), tuple(sequence.token_ids[i * size : (i + 1) * size])
            )
            if page is None:
                break
            pages.append(page)
        return pages

    def schedule(self) -> Schedule:
        """Plans the next step and takes pages for the positions it computes."""
        for s in self._fresh:
            if s.is_running:
                self._register(s, s.num_tokens)
            if s.choice == 0 and (
                not s.is_running or s.num_computed_tokens >= len(s.request.prompt_token_ids)
            ):
                self._release(s.request.request_id)
        self._fresh = []
        decoding = [s for s in self._running if s.is_decoding and _remaining(s) > 0]
        prefilling = deque(
            s for s in self._running if s.num_computed_tokens < s.num_prefill_tokens
        )
        num_tiles = self.config.max_num_batched_tokens // self.config.chunk_tile

        num_steps = self._num_steps(decoding, prefilling)
        decodes = [s for s in decoding if self._make_room(s, min(num_steps, _remaining(s)))]
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
        self._fresh = list(chunks)
        # Room for a chunk may have been made by preempting a decode of higher rank, planned
        # above, but never a chunk: these are planned in order of rank.
        return Schedule(
            decodes=tuple(
                _advance(s, min(num_steps, _remaining(s)), True) for s in decodes if s.is_running
            ),
            chunks=tuple(
                _advance(s, num_new_tokens, False) for s, num_new_tokens in chunks.items()
            ),
            num_steps=num_steps,
        )

    def _num_steps(self, decoding: list[Sequence], prefilling: object) -> int:
        if self._waiting or self._held or prefilling or not decoding:
            return 1
        if any(s.request.logprobs is not None for s in decoding):
            return 1
        steps = min(self.config.max_steps_per_call, max(map(_remaining, decoding)))
        wanted = sum(
            self.page_pool.num_pages_for(s.num_computed_tokens + min(steps, _remaining(s)))
            - len(s.page_ids)
            for s in decoding
        )
        return steps if wanted <= self.page_pool.num_free else 1

    def update(self, schedule: Schedule, step_output: StepOutput) -> list[RequestOutput]:
        """Takes in what a step of ``schedule`` yielded; one output for each sequence it changed.

        Steps are read in the order in which they were scheduled.
        """
        outputs = []
        scheduled_all = chain(schedule.decodes, schedule.chunks)
        for scheduled, result in zip(scheduled_all, step_output.sequences, strict=True):
            sequence = self._live.get((scheduled.request_id, scheduled.choice))
            # Late: the request is gone, waits again, or has had a slot anew since.
            if sequence is None or sequence.admission != scheduled.admission:
                continue
            if scheduled.is_first or scheduled.token_ids:
                known = len(sequence.prompt_logprobs) - scheduled.start
                sequence.prompt_logprobs += result.prompt_logprobs[max(0, known) :]
            if scheduled.samples:
                count = 1 if scheduled.token_ids else scheduled.num_tokens
                sequence.num_in_flight_tokens -= count
                sequence.num_computed_tokens -= count - len(result.token_ids)
                if result.token_ids:
                    outputs.append(self._append(sequence, result))
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
            page_ids = self.page_pool.allocate(max(0, num_pages - len(sequence.page_ids)))
            if page_ids is not None:
                for page in page_ids:
                    if page in self.cache:
                        self.cache.forget(page)
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
        hits = self._hits(sequence)
        free_hits = sum(page in self.page_pool._kept for page in hits)
        needed = self.page_pool.num_pages_for(sequence.num_tokens + 1) - len(hits)
        if needed > self.page_pool.num_free - free_hits:
            return None
        del self._waiting[0]
        self.page_pool.share(hits)
        sequence.page_ids = list(hits)
        sequence.num_registered = len(hits)
        sequence.num_computed_tokens = len(hits) * self.config.page_size
        self._num_cached_tokens += sequence.num_computed_tokens
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = min(
                sequence.num_computed_tokens, len(sequence.request.prompt_token_ids)
            )
        sequence.is_new = True
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

    def _append(self, sequence: Sequence, result) -> RequestOutput:
        request, reason = sequence.request, None
        num_tokens = sequence.num_tokens
        prompt_logprobs = ()
        if not sequence.num_output_tokens:
            self._num_prompt_tokens += len(request.prompt_token_ids)
            if request.prompt_logprobs is not None and sequence.choice == 0:
                prompt_logprobs = (None, *sequence.prompt_logprobs)
        for token_id in result.token_ids:
            sequence.token_ids.append(token_id)
            if (
                token_id in request.ending_token_ids
                and sequence.num_output_tokens > request.min_tokens
            ):
                reason = FinishReason.STOP
            elif sequence.num_output_tokens == request.max_tokens:
                reason = FinishReason.LENGTH
            if reason:
                break
        new_token_ids = tuple(sequence.token_ids[num_tokens:])
        self._num_output_tokens += len(new_token_ids)
        if reason:
            self._register(sequence, sequence.num_tokens - 1)
            self._end(sequence)
        else:
            self._register(sequence, sequence.num_tokens)
        return _output(
            sequence,
            new_token_ids,
            reason,
            result.logprobs[: len(new_token_ids)],
            prompt_logprobs,
        )

    def _end(self, sequence: Sequence) -> None:
        """Forgets a request, wherever it is."""
        if sequence in self._held.get(sequence.request.request_id, []):
            self._held[sequence.request.request_id].remove(sequence)
        else:
            self._leave(sequence)
        if sequence.choice == 0:
            self._release(sequence.request.request_id)
        del self._live[sequence.request.request_id, sequence.choice]

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of its queue and gives its slot and pages back."""
        queue = self._running if sequence.is_running else self._waiting
        index = bisect_left(queue, sequence.rank, key=_rank)
        assert queue[index] is sequence
        del queue[index]
        self.page_pool.free(sequence.page_ids, self.cache.__contains__)
        sequence.page_ids.clear()
        sequence.num_computed_tokens = sequence.num_in_flight_tokens = 0
        sequence.num_registered = 0
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
        sequence.slot = sequence.admission = None


def _remaining(sequence: Sequence) -> int:
    return (
        sequence.request.max_tokens - sequence.num_output_tokens - sequence.num_in_flight_tokens
    )


def _advance(sequence: Sequence, num_new_tokens: int, is_decode: bool) -> ScheduledSequence:
    assert sequence.slot is not None
    assert sequence.admission is not None
    start = sequence.num_computed_tokens
    sequence.num_computed_tokens += num_new_tokens
    prompt = sequence.request.prompt_token_ids
    end = sequence.num_computed_tokens
    samples = is_decode or end == sequence.num_tokens
    if samples:
        sequence.num_in_flight_tokens += num_new_tokens if is_decode else 1
    is_first = not is_decode and sequence.is_new
    sequence.is_new = False
    return ScheduledSequence(
        request=sequence.request,
        choice=sequence.choice,
        slot=sequence.slot,
        admission=sequence.admission,
        start=start,
        num_tokens=num_new_tokens,
        page_ids=tuple(sequence.page_ids),
        samples=samples,
        token_ids=() if is_decode else tuple(sequence.token_ids[start:end]),
        is_first=is_first,
        cached_token_ids=tuple(sequence.token_ids[:start]) if is_first else (),
        next_token_id=0 if is_decode or end >= len(prompt) else prompt[end],
    )


def _output(sequence, token_ids, reason, logprobs=(), prompt_logprobs=()) -> RequestOutput:
    return RequestOutput(
        request_id=sequence.request.request_id,
        token_ids=token_ids,
        finish_reason=reason,
        choice=sequence.choice,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        num_prompt_tokens=len(sequence.request.prompt_token_ids),
        num_cached_tokens=sequence.num_cached_tokens,
        num_output_tokens=sequence.num_output_tokens,
        num_preemptions=sequence.num_preemptions,
    )
