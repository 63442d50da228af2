"""A model that drafts, inside the program of a step: the draft's part of it.

The draft has keys and values of its own under the same page ids, or is the target's first layers
and shares theirs. It draws with the noise that belongs to a position, as the target will: two
models that agree on a token's probability agree on the token. Axis letters: D decodes, N tiles of B
rows, K drafts, S slots, V vocab.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.batch import Batch, BatchShape
from jaxinfer.config import EngineConfig
from jaxinfer.sampling import SlotTables, log_distribution, sample, sample_from
from jaxinfer.speculation.drafts import Drafts
from jaxinfer.speculation.rejection import DRAFT_NOISE
from jaxinfer.speculation.speculative import propose_ngrams
from jaxinfer.step_state import StepState
from pallas_kernels.ragged_paged_attention import QueryTiles, RaggedBatch

# What a draft model lacks of a sequence from step to step: the last draft, if all were right, and
# the token that came after it.
NEW_ROWS = 2


class TargetAndDraft(NamedTuple):
    """Something of both models of a step; ``draft`` is None without a draft model."""

    target: Any
    draft: Any = None


@dataclass(frozen=True)
class Drafter:
    """The model that drafts. ``vocab_size``: the target's, to which its logits are cut or padded.

    With ``num_layers`` it is that many of the target's layers, and writes the target's own keys and
    values: verification writes the same again.
    """

    model: Any
    config: EngineConfig
    vocab_size: int
    num_layers: int = 0

    def lens(self, state: StepState, slots: jax.Array) -> jax.Array:
        """[D] int32: of how many tokens the draft has keys and values."""
        lens = state.lens if self.num_layers else state.draft_lens
        return lens.at[slots].get(mode="fill", fill_value=0)

    def run(
        self,
        state: StepState,
        page_table: jax.Array,
        decodes: QueryTiles,
        chunks: QueryTiles,
        token_ids: jax.Array,
    ) -> tuple[jax.Array, StepState]:
        """Hidden states [T, E], and the state with the keys and values of ``token_ids`` [T]."""
        batch = RaggedBatch(page_table, decodes, chunks)
        if self.num_layers:
            own = state.kv_pages[: self.num_layers]
            hidden, written = self.model(token_ids, own, batch)
            pages = (*written, *state.kv_pages[self.num_layers :])
            return hidden, replace(state, kv_pages=pages)
        hidden, pages = self.model(token_ids, state.draft_kv_pages, batch)
        return hidden, replace(state, draft_kv_pages=pages)

    def choose(
        self, hidden: jax.Array, batch: Batch, state: StepState, slots: jax.Array, at: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """[D] int32: the tokens at positions ``at`` [D] after ``hidden`` [D, E].

        For rejection drawn with a noise that is not the target's, and [D, V] what from.
        """
        logits = self.model.logits(hidden)[:, : self.vocab_size]
        missing = self.vocab_size - logits.shape[1]
        logits = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
        tables = SlotTables(state.tokens, state.bias_ids, state.bias_values)
        columns = batch.slots.of(slots).sampling()
        if self.config.verify == "exact":
            return sample(logits, at, slots, columns, tables), None
        logprobs = log_distribution(logits, at, slots, columns, tables)
        return sample_from(logprobs, at, columns, DRAFT_NOISE), logprobs


def drafter(models: TargetAndDraft, config: EngineConfig) -> Drafter | None:
    """The model that drafts, None where no model does."""
    vocab_size = models.target.model.vocab_size
    if config.draft == "layers":
        return Drafter(models.target, config, vocab_size, config.num_draft_layers)
    if config.draft == "model":
        return Drafter(models.draft, config, vocab_size)
    return None


def propose(
    models: TargetAndDraft, config: EngineConfig, shape: BatchShape, state: StepState, batch: Batch
) -> tuple[Drafts, StepState]:
    """Drafts for every decode, and the state with them in its table.

    No more than the call may yield, and than the sequence may grow by, its own next token aside.
    With a draft model the batch's chunks get their keys and values in its pages, too.
    """
    slots, max_drafts = batch.decode_slots, shape.num_drafts
    model = drafter(models, config)
    if not max_drafts:
        none = Drafts(jnp.zeros((*slots.shape, 0), jnp.int32), jnp.zeros_like(slots))
        if config.draft == "model" and shape.num_tiles and model:
            _, state = _first(model, state, batch, none.num_drafts)
        return none, state
    lens = state.lens.at[slots].get(mode="fill", fill_value=0)
    ends = batch.slots.of(slots).end_positions
    num_drafts = jnp.minimum(jnp.minimum(batch.max_drafts, batch.max_tokens - 1), ends - lens - 2)
    num_drafts = jnp.clip(num_drafts, 0, max_drafts)
    if model:
        return _propose_by_model(model, max_drafts, num_drafts, state, batch)
    tokens = state.tokens.at[slots].get(mode="fill", fill_value=0)
    drafts, found = propose_ngrams(tokens, lens + 1, max_drafts)
    num_drafts = jnp.minimum(num_drafts, found)
    for number in range(max_drafts):
        state = _write(state, slots, lens + 1 + number, drafts[:, number], number < num_drafts)
    logprobs = None
    if config.verify == "rejection":
        vocabulary = jnp.arange(models.target.model.vocab_size)[None, None, :]
        is_draft = drafts[..., None] == vocabulary
        logprobs = jnp.where(is_draft, 0.0, -jnp.inf)
    return Drafts(drafts, num_drafts, logprobs), state


def _propose_by_model(
    model: Drafter, max_drafts: int, num_drafts: jax.Array, state: StepState, batch: Batch
) -> tuple[Drafts, StepState]:
    """Catches up with what the draft model lacks, then drafts one token after the other."""
    slots = batch.decode_slots
    lens = state.lens.at[slots].get(mode="fill", fill_value=0)
    if not model.num_layers:
        state = _catch_up(model, state, batch, lens, num_drafts > 0)
    hidden, state = _first(model, state, batch, num_drafts)
    draft, logprobs = model.choose(hidden, batch, state, slots, lens + 1)
    state = _write(state, slots, lens + 1, draft, num_drafts > 0)

    most = jnp.max(num_drafts)  # no further than somebody wants

    def draft_next(
        carry: tuple[jax.Array, StepState, jax.Array, jax.Array | None],
    ) -> tuple[jax.Array, StepState, jax.Array, jax.Array | None]:
        number, state, drafts, all_logprobs = carry
        goes_on = number < num_drafts
        tiles = _tiles(slots, lens + number, jnp.where(goes_on, 1, 0), 1, model.config)
        draft = drafts[:, number - 1]
        hidden, state = model.run(state, batch.page_table, tiles, _no_tiles(tiles), draft)
        following = jnp.where(goes_on, slots, model.config.max_num_seqs)
        draft, logprobs = model.choose(hidden, batch, state, following, lens + number + 1)
        state = _write(state, slots, lens + number + 1, draft, goes_on)
        if all_logprobs is not None:
            all_logprobs = all_logprobs.at[:, number].set(logprobs)
        return number + 1, state, drafts.at[:, number].set(draft), all_logprobs

    drafts = jnp.zeros((*slots.shape, max_drafts), jnp.int32).at[:, 0].set(draft)
    if logprobs is not None:
        everywhere = (*slots.shape, max_drafts, model.vocab_size)
        logprobs = jnp.zeros(everywhere, logprobs.dtype).at[:, 0].set(logprobs)
    start = (jnp.int32(1), state, drafts, logprobs)
    loop = jax.lax.while_loop(lambda carry: carry[0] < most, draft_next, start)
    _, state, drafts, logprobs = loop
    # The last draft was not fed to the draft model.
    known = jnp.where(num_drafts > 0, lens + num_drafts, model.lens(state, slots))
    state = replace(state, draft_lens=state.draft_lens.at[slots].set(known, mode="drop"))
    return Drafts(drafts, num_drafts, logprobs), state


def _catch_up(
    model: Drafter, state: StepState, batch: Batch, lens: jax.Array, wants: jax.Array
) -> StepState:
    """Brings decodes that want drafts so far that ``NEW_ROWS`` are enough: usually nothing to do.

    The draft lags where steps had no drafts, and where the prefix cache had the target's keys and
    values alone.
    """
    slots, size = batch.decode_slots, model.config.chunk_tile

    def missing(state: StepState) -> jax.Array:
        return jnp.where(wants, lens - model.lens(state, slots), 0)

    def go_on(state: StepState) -> StepState:
        starts, new = model.lens(state, slots), jnp.clip(missing(state), 0, size)
        chunks = _tiles(slots, starts, new, size, model.config)
        decodes = _tiles(slots, starts, jnp.zeros_like(starts), 1, model.config)
        token_ids = jnp.concatenate([jnp.zeros_like(starts), _tokens(state, slots, chunks)])
        _, state = model.run(state, batch.page_table, decodes, chunks, token_ids)
        draft_lens = state.draft_lens.at[slots].set(starts + new, mode="drop")
        return replace(state, draft_lens=draft_lens)

    return jax.lax.while_loop(lambda state: jnp.any(missing(state) >= NEW_ROWS), go_on, state)


def _first(
    model: Drafter, state: StepState, batch: Batch, num_drafts: jax.Array
) -> tuple[jax.Array, StepState]:
    """Hidden states [D, E] of the decodes' own tokens, and the state with those and all chunks."""
    slots, config = batch.decode_slots, model.config
    rows = 1 if model.num_layers else NEW_ROWS
    starts = model.lens(state, slots)
    lens = state.lens.at[slots].get(mode="fill", fill_value=0)
    new = jnp.where(num_drafts > 0, lens + 1 - starts, 0)
    decodes = _tiles(slots, starts, new, rows, config)
    token_ids = _tokens(state, slots, decodes)
    chunks = _no_tiles(decodes)
    if not model.num_layers and batch.chunk_slots.shape[0]:
        size = config.chunk_tile
        chunks = _tiles(batch.chunk_slots, batch.chunk_starts, batch.chunk_lens, size, config)
        token_ids = jnp.concatenate([token_ids, batch.chunk_tokens.reshape(-1)])
        state = _note_chunks(state, batch, config)
    hidden, state = model.run(state, batch.page_table, decodes, chunks, token_ids)
    last = jnp.arange(slots.shape[0]) * rows + jnp.maximum(new - 1, 0)
    return hidden[last], state


def _note_chunks(state: StepState, batch: Batch, config: EngineConfig) -> StepState:
    """``draft_lens`` of slots that have chunks: only what follows on what was there counts."""
    everywhere = jnp.arange(config.max_num_seqs, dtype=jnp.int32)
    nothing = jnp.zeros_like(everywhere)
    first = (
        (nothing + config.max_model_len).at[batch.chunk_slots].min(batch.chunk_starts, mode="drop")
    )
    end = nothing.at[batch.chunk_slots].max(batch.chunk_starts + batch.chunk_lens, mode="drop")
    columns = batch.slots
    # The first chunk of an admission: before it is what the prefix cache had.
    is_new = first == columns.cached_lens
    known = jnp.where(is_new, columns.draft_cached_lens, state.draft_lens)
    known = jnp.where(known >= first, end, known)
    return replace(state, draft_lens=jnp.where(end > 0, known, state.draft_lens))


def _tiles(
    slots: jax.Array, starts: jax.Array, lens: jax.Array, rows: int, config: EngineConfig
) -> QueryTiles:
    """A tile for each of ``slots``; one of S is padding."""
    num_slots = config.max_num_seqs
    return QueryTiles(
        sequences=jnp.minimum(slots, num_slots - 1),
        starts=starts,
        lens=jnp.where(slots < num_slots, lens, 0).astype(jnp.int32),
        rows=rows,
    )


def _no_tiles(like: QueryTiles) -> QueryTiles:
    none = like.starts[:0]
    return QueryTiles(none, none, none, 1)


def _tokens(state: StepState, slots: jax.Array, tiles: QueryTiles) -> jax.Array:
    """[D * rows] int32: the known tokens at the tiles' positions."""
    tokens = state.tokens.at[slots[:, None], tiles.positions()].get(mode="fill", fill_value=0)
    return tokens.reshape(-1)


def _write(
    state: StepState, slots: jax.Array, at: jax.Array, tokens: jax.Array, is_real: jax.Array
) -> StepState:
    """Puts ``tokens`` [D] in the table of tokens, where they ``is_real`` [D]."""
    written = jnp.where(is_real, slots, state.tokens.shape[0])
    return replace(state, tokens=state.tokens.at[written, at].set(tokens, mode="drop"))
