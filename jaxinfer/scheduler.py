"""Decides which sequences run in a call of the device and how many tokens each of them brings.

Host only: never imports JAX, knows neither model nor device. There is no prefill phase and no
decode phase, only one subtraction: ``num_tokens - num_computed_tokens``.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import chain, count, islice
from operator import attrgetter

from jaxinfer.config import EngineConfig
from jaxinfer.page_pool import PagePool
from jaxinfer.prefix_cache import PrefixCache
from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import (
    EngineStats,
    RequestOutput,
    Schedule,
    SequenceOutput,
    StepOutput,
)
from jaxinfer.sequence import Sequence
from jaxinfer.speculation.draft_policy import DraftPolicy

_rank = attrgetter("rank")


class Scheduler:
    """Owns the sequences, the slots, the page pool and the prefix cache. Not thread-safe.

        add --> waiting --admit--> running --update--> finished
         |       ^  ^----preempt------'
         '-> held back: the further choices of a request, until the first one's prompt is computed

    ``schedule`` gives each running sequence ``min(num_tokens - num_computed_tokens, budget)``,
    decodes before chunks, then admits waiting ones while slots, pages and budget last. If a page
    is missing, the running sequence of the highest ``rank`` is preempted: its pages are freed and
    its tokens kept, to be computed again as chunks.

    The budget is in rows. Each decode has its own row, at most ``max_num_seqs`` in all, outside
    of ``max_num_batched_tokens``; a chunk takes whole tiles of ``chunk_tile`` rows, and only a
    chunk that brings the last known token may leave a tile partly empty.

    Why it never stalls: the first in rank can preempt all others, and the pool holds
    ``max_model_len`` tokens; so the first in rank brings tokens in every call until it finishes.

    Calls run ahead. ``num_computed_tokens`` and ``num_in_flight_tokens`` move when a call is
    scheduled, not when it is read, and the next one is scheduled as if every row of those in flight
    had yielded its tokens. ``update`` drops what comes late for a sequence that was aborted,
    finished or preempted in between. Its pages can be given away at once: the device runs calls in
    order, so the new holder's writes come after the late ones.

    Why cached pages can be trusted: a page is registered when all its tokens are known and calls
    that compute them are scheduled, and found from the next ``schedule`` on, by calls that run
    later. The last token of a finished sequence is left out: the device ended the sequence there,
    and a call in flight did not compute it. Late writes go behind the known tokens.
    """

    def __init__(self, config: EngineConfig, draft_policy: DraftPolicy | None = None) -> None:
        self.config = config
        self.draft_policy = draft_policy or DraftPolicy(config)
        self.page_pool = PagePool(config.num_pages, config.page_size)
        self.prefix_cache = PrefixCache(config.page_size)
        # request id -> its choices that live.
        self._live: dict[str, dict[int, Sequence]] = {}
        # Both sorted by rank; a sequence that lives is in one of them, or held back.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._held_back: dict[str, list[Sequence]] = {}
        self._last_chunks: list[Sequence] = []
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._arrivals = count()
        self._admissions = count()
        self._num_prompt_tokens = 0
        self._num_chunk_tokens = 0
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self._num_preemptions = 0
        self._num_drafted_tokens = 0
        self._num_accepted_tokens = 0

    def limit(self, sizes: EngineConfig) -> None:
        """Plans no larger steps than ``sizes`` allow. ``RuntimeError`` when requests live."""
        if self._live:
            raise RuntimeError("sizes are limited before requests are added")
        self.config = sizes
        self._free_slots = list(reversed(range(sizes.max_num_seqs)))

    @property
    def has_unfinished(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._live)

    @property
    def stats(self) -> EngineStats:
        """A snapshot. A prompt is counted when its first new token is known."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + sum(map(len, self._held_back.values())),
            num_pages=self.page_pool.num_pages,
            num_free_pages=self.page_pool.num_free,
            num_prompt_tokens=self._num_prompt_tokens,
            num_chunk_tokens=self._num_chunk_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=self._num_preemptions,
            num_cached_tokens=self._num_cached_tokens,
            # Without a common cache nobody else's prompt can find them.
            num_cached_pages=self.page_pool.num_kept if self.config.prefix_cache else 0,
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )

    def is_live(self, request_id: str) -> bool:
        """Tells if any choice of a request is unfinished."""
        return request_id in self._live

    def add(self, request: Request, arrival_seconds: float = 0.0) -> None:
        """Lets the choices of a request wait. ``ValueError`` if its id is in use or it never fits.

        ``arrival_seconds`` is the time on any clock that does not go backwards.
        """
        if request.request_id in self._live:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        request.check_length(self.config.max_model_len)
        arrival = next(self._arrivals)
        seconds = arrival_seconds - request.priority * self.config.priority_seconds
        # Without a common cache each request has a domain of its own, which its choices share.
        domain = "shared" if self.config.prefix_cache else f"request {arrival}"
        first, *others = (
            Sequence(
                request,
                choice,
                rank=(seconds, arrival, choice),
                salt=f"{domain}:{request.cache_salt}",
                arrival_seconds=arrival_seconds,
            )
            for choice in range(request.n)
        )
        self._live[request.request_id] = {s.choice: s for s in (first, *others)}
        insort(self._waiting, first, key=_rank)
        if others:
            self._held_back[request.request_id] = others

    def abort(self, request_id: str, choice: int | None = None) -> list[RequestOutput]:
        """Ends a request or one choice of it at once; the last output of each that was live."""
        choices = self._live.get(request_id, {})
        wanted = tuple(choices) if choice is None else (choice,)
        ended = [choices[choice] for choice in wanted if choice in choices]
        # The first choice last: its end lets those go on that were held back.
        for sequence in reversed(ended):
            self._register(sequence)
            self._end(sequence)
        return [sequence.output(SequenceOutput(), FinishReason.ABORT) for sequence in ended]

    def schedule(self, now: float | None = None) -> Schedule:
        """Plans the next call and takes pages for the positions it computes.

        ``now``, on the clock of ``arrival_seconds``, is for telling how long requests waited.
        """
        self._note_last_chunks()
        prefilling = deque(s for s in self._running if s.is_prefilling)
        # Whoever has all its tokens in flight only waits for them to be read.
        decoding = [s for s in self._running if not s.is_prefilling and s.num_remaining_tokens > 0]
        num_steps = 1 if prefilling else self._num_steps(decoding)
        drafts = self._drafts(decoding, num_steps)
        num_tiles = self._num_tiles(prefilling)

        new_tokens = {s: _most_tokens(s, num_steps, drafts[s]) for s in decoding}
        decodes = [s for s in decoding if self._make_room(s, new_tokens[s])]
        chunks: dict[Sequence, int] = {}
        while num_tiles:
            sequence = prefilling.popleft() if prefilling else self._admit(now)
            if sequence is None:
                break
            num_new_tokens = self._chunk_len(sequence, num_tiles)
            if num_new_tokens and self._make_room(sequence, num_new_tokens):
                chunks[sequence] = num_new_tokens
                num_tiles -= -(-num_new_tokens // self.config.chunk_tile)

        self._num_chunk_tokens += sum(chunks.values())
        self._last_chunks = list(chunks)
        # Room for a chunk may have been made by preempting a decode of higher rank, planned
        # above, but never a chunk: these are planned in order of rank.
        return Schedule(
            decodes=tuple(
                s.schedule_decode(new_tokens[s], drafts[s]) for s in decodes if s.is_running
            ),
            chunks=tuple(s.schedule_chunk(num_new_tokens) for s, num_new_tokens in chunks.items()),
            num_steps=num_steps,
            num_drafts=max(drafts.values(), default=0),
        )

    def update(self, schedule: Schedule, step_output: StepOutput) -> list[RequestOutput]:
        """Takes in what a call of ``schedule`` yielded; one output for each choice it changed.

        Calls are read in the order in which they were scheduled.
        """
        outputs = []
        scheduled_sequences = chain(schedule.decodes, schedule.chunks)
        for scheduled, output in zip(scheduled_sequences, step_output.sequences, strict=True):
            sequence = self._live.get(scheduled.request_id, {}).get(scheduled.choice)
            # Late: the request is gone, waits again, or has had a slot anew since.
            if sequence is None or sequence.admission != scheduled.admission:
                continue
            if output.prompt_logprobs:
                # After a preemption some come again.
                known = len(sequence.prompt_logprobs) - scheduled.start
                sequence.prompt_logprobs += output.prompt_logprobs[known:]
            # Of calls that are read in order the later ones have more.
            sequence.num_drafter_kv_tokens = max(
                sequence.num_drafter_kv_tokens, output.num_drafter_kv_tokens
            )
            if scheduled.samples:
                num_expected = 1 if scheduled.token_ids else scheduled.num_tokens
                sequence.num_in_flight_tokens -= num_expected
                # Fewer come when the last of them ends the sequence, or drafts were wrong.
                sequence.num_computed_tokens -= num_expected - len(output.token_ids)
                self.draft_policy.note_output(sequence, scheduled.num_drafts, output)
                self._count_drafts(sequence, output)
                outputs.append(self._append(sequence, output))
        return outputs

    def check_integrity(self) -> None:
        """Asserts what must hold between any two calls. For tests and idle times."""
        live = [s for choices in self._live.values() for s in choices.values()]
        self.page_pool.check_integrity(s.page_ids for s in live)
        self.prefix_cache.check_integrity()
        held_back = [s for choices in self._held_back.values() for s in choices]
        queued = self._waiting + self._running + held_back
        assert len(queued) == len(live)
        assert set(queued) == set(live)
        for queue in (self._waiting, self._running):
            ranks = [s.rank for s in queue]
            assert ranks == sorted(ranks), f"queue out of order: {ranks}"
        slots = [s.slot for s in self._running if s.slot is not None] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs)), f"slots {slots}"
        for s in self._waiting + held_back:
            assert s.slot is None
            assert not s.page_ids
            assert s.num_computed_tokens == s.num_in_flight_tokens == s.num_registered_pages == 0
        for s in self._running:
            assert s.is_running
            assert 0 <= s.num_in_flight_tokens <= s.request.max_tokens - s.num_output_tokens
            assert s.num_computed_tokens <= s.num_tokens + s.num_in_flight_tokens
            num_pages = self.page_pool.num_pages_for(s.num_computed_tokens)
            # More where drafts were wrong, for which there had to be room.
            num_spare = len(s.page_ids) - num_pages
            most_drafts = self.config.most_drafts
            most = self.config.max_steps_per_call * (most_drafts + 1)
            assert 0 <= num_spare <= (self.page_pool.num_pages_for(most) + 1 if most_drafts else 0)

    def _num_steps(self, decoding: list[Sequence]) -> int:
        """Several when nobody waits for a slot or a log-probability, and the free pages suffice."""
        num_steps = self.config.max_steps_per_call
        if num_steps == 1 or not decoding or self._waiting or self._held_back:
            return 1
        if any(s.request.logprobs is not None for s in decoding):
            return 1
        num_steps = min(num_steps, max(s.num_remaining_tokens for s in decoding))
        return num_steps if self._has_room(decoding, num_steps) else 1

    def _drafts(self, decoding: list[Sequence], num_steps: int) -> dict[Sequence, int]:
        """As many as are wanted, where nobody must be preempted for what may be drafted wrong."""
        if not decoding:
            return {}
        drafts = dict(zip(decoding, self.draft_policy.choose(decoding), strict=True))
        if not self._has_room(decoding, num_steps, drafts):
            return dict.fromkeys(decoding, 0)
        return drafts

    def _has_room(
        self, decoding: list[Sequence], num_steps: int, drafts: Mapping[Sequence, int] | None = None
    ) -> bool:
        """Tells if the free pages suffice for all that a call may yield."""
        drafts = drafts or {}
        num_pages = sum(
            max(0, self._num_missing_pages(s, _most_tokens(s, num_steps, drafts.get(s, 0))))
            for s in decoding
        )
        return num_pages <= self.page_pool.num_free

    def _count_drafts(self, sequence: Sequence, output: SequenceOutput) -> None:
        sequence.num_drafted_tokens += output.num_drafted
        sequence.num_accepted_tokens += output.num_accepted
        self._num_drafted_tokens += output.num_drafted
        self._num_accepted_tokens += output.num_accepted

    def _num_tiles(self, prefilling: Iterable[Sequence]) -> int:
        """As many tiles as are wanted, but rather fewer than a step that is mostly padding."""
        tile, counts = self.config.chunk_tile, self.config.tile_counts
        wanted = 0
        for s in chain(prefilling, islice(self._waiting, len(self._free_slots))):
            wanted += -(-(s.num_tokens - s.num_computed_tokens) // tile)
            if wanted >= counts[-1]:
                return counts[-1]
        padded = min(count for count in counts if count >= wanted)
        fewer = max((count for count in counts if count < wanted), default=padded)
        return padded if 2 * wanted >= padded else fewer

    def _chunk_len(self, sequence: Sequence, num_tiles: int) -> int:
        num_new_tokens = sequence.num_prefill_tokens - sequence.num_computed_tokens
        return min(num_new_tokens, num_tiles * self.config.chunk_tile)

    def _num_missing_pages(self, sequence: Sequence, num_new_tokens: int) -> int:
        num_tokens = sequence.num_computed_tokens + num_new_tokens
        return self.page_pool.num_pages_for(num_tokens) - len(sequence.page_ids)

    def _make_room(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Takes pages for the next tokens, preempting as needed; False if it was itself."""
        while sequence.is_running:
            num_pages = self._num_missing_pages(sequence, num_new_tokens)
            if num_pages <= 0:
                return True
            page_ids = self.page_pool.allocate(num_pages)
            if page_ids is not None:
                self.prefix_cache.forget(page_ids)
                sequence.page_ids.extend(page_ids)
                return True
            self._preempt(self._running[-1])
        return False

    def _admit(self, now: float | None) -> Sequence | None:
        """Gives the first waiting sequence a slot, if all its tokens and one more would fit.

        No running sequence still needs pages for its prompt then: a chunk that leaves some of it
        uses up the budget, and nobody is admitted after that. So only growth by decoding leads to
        preemption. A sequence preempted in this call does not fit, as pages ran out without it.
        """
        if not self._waiting or not self._free_slots:
            return None
        sequence = self._waiting[0]
        # What the cache has is not computed, so nothing is known of its tokens' probabilities.
        found = [] if sequence.wants_prompt_logprobs else self.prefix_cache.find(sequence)
        num_missing = self.page_pool.num_pages_for(sequence.num_tokens + 1) - len(found)
        if num_missing > self.page_pool.num_free - self.page_pool.num_kept_among(found):
            return None
        del self._waiting[0]
        self.page_pool.share(found)
        sequence.page_ids = found
        sequence.num_registered_pages = len(found)
        sequence.num_computed_tokens = len(found) * self.config.page_size
        sequence.num_drafter_kv_pages = self.prefix_cache.num_drafter_kv_pages(found)
        sequence.num_drafter_kv_tokens = sequence.num_drafter_kv_pages * self.config.page_size
        self._num_cached_tokens += sequence.num_computed_tokens
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if now is not None:
                sequence.queue_seconds = now - sequence.arrival_seconds
        sequence.slot = self._free_slots.pop()
        sequence.admission = next(self._admissions)
        sequence.num_prefill_tokens = sequence.num_tokens
        insort(self._running, sequence, key=_rank)
        return sequence

    def _note_last_chunks(self) -> None:
        """Makes the pages that the call before this one computes findable from now on."""
        for sequence in self._last_chunks:
            if sequence.is_running:
                self._register(sequence)
            if not sequence.is_prefilling or not sequence.is_running:
                self._release(sequence)
        self._last_chunks = []

    def _register(self, sequence: Sequence, *, has_ended: bool = False) -> None:
        known = sequence.num_tokens - has_ended
        self.prefix_cache.register(sequence, min(known, sequence.num_computed_tokens))
        self.prefix_cache.note_drafter_kv_pages(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Lets the other choices wait once the first one has computed its prompt, or has left."""
        if sequence.choice == 0:
            for other in self._held_back.pop(sequence.request.request_id, ()):
                insort(self._waiting, other, key=_rank)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        insort(self._waiting, sequence, key=_rank)

    def _append(self, sequence: Sequence, output: SequenceOutput) -> RequestOutput:
        """Adds new tokens up to the one that ends the choice."""
        request, reason = sequence.request, None
        num_tokens = sequence.num_tokens
        is_first = not sequence.num_output_tokens
        if is_first:
            self._num_prompt_tokens += len(request.prompt_token_ids)
        for token_id in output.token_ids:
            sequence.token_ids.append(token_id)
            num_output_tokens = sequence.num_output_tokens
            if token_id in request.ending_token_ids and num_output_tokens > request.min_tokens:
                reason = FinishReason.STOP
            elif num_output_tokens == request.max_tokens:
                reason = FinishReason.LENGTH
            if reason:
                break
        num_new_tokens = sequence.num_tokens - num_tokens
        self._num_output_tokens += num_new_tokens
        self._register(sequence, has_ended=reason is not None)
        if reason:
            self._end(sequence)
        new = SequenceOutput(output.token_ids[:num_new_tokens], output.logprobs[:num_new_tokens])
        return sequence.output(new, reason, is_first)

    def _end(self, sequence: Sequence) -> None:
        """Forgets a choice, wherever it is."""
        self.draft_policy.forget(sequence)
        request_id = sequence.request.request_id
        held_back = self._held_back.get(request_id, [])
        if sequence in held_back:
            held_back.remove(sequence)
            if not held_back:
                del self._held_back[request_id]
        else:
            self._leave(sequence)
            self._release(sequence)
        choices = self._live[request_id]
        del choices[sequence.choice]
        if not choices:
            del self._live[request_id]

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of its queue and gives its slot and pages back."""
        queue = self._running if sequence.is_running else self._waiting
        index = bisect_left(queue, sequence.rank, key=_rank)
        assert queue[index] is sequence
        del queue[index]
        self.page_pool.free(sequence.page_ids, keep=self.prefix_cache)
        sequence.page_ids = []
        sequence.num_computed_tokens = sequence.num_in_flight_tokens = 0
        sequence.num_registered_pages = sequence.num_drafter_kv_pages = 0
        sequence.num_drafter_kv_tokens = 0
        sequence.has_chunk = False
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
        sequence.slot = sequence.admission = None


def _most_tokens(sequence: Sequence, num_steps: int, num_drafts: int) -> int:
    """Tokens of a call, if all drafts are right."""
    return min(num_steps * (num_drafts + 1), sequence.num_remaining_tokens)
