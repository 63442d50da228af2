"""A smaller model that drafts, with keys and values of its own under the same page ids.

Axis letters: D decodes, N tiles of B rows, S slots.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxinfer.batch import Batch
from jaxinfer.config import EngineConfig
from jaxinfer.speculation.drafter import TargetAndDraft
from jaxinfer.speculation.drafts import Drafts, Wanted
from jaxinfer.speculation.running import draft_in_turn, last_rows, no_tiles, tiles_of, tokens_of
from jaxinfer.step_state import StepState
from pallas_kernels.ragged_paged_attention import RaggedBatch

# Tokens that it lacks of a sequence from step to step: the last draft, if all were right, and the
# token that came after it.
NEW_ROWS = 2


class Drafter:
    """Another model of the same vocabulary. ``state.draft_lens`` says how far its pages have come.

    It lags where steps had no drafts, and where the prefix cache had the target's keys and values
    alone.
    """

    def __init__(self, models: TargetAndDraft, config: EngineConfig) -> None:
        self.model, self.config = models.draft, config
        self.vocab_size: int = models.target.model.vocab_size

    def lens(self, state: StepState, slots: jax.Array) -> jax.Array:
        """Returns of how many tokens of ``slots`` it has keys and values, [D] int32."""
        return state.draft_lens.at[slots].get(mode="fill", fill_value=0)

    def run(
        self, state: StepState, batch: RaggedBatch, token_ids: jax.Array
    ) -> tuple[jax.Array, StepState]:
        """Runs the model. Returns hidden states [T, E] and the state with its pages."""
        hidden, pages = self.model(token_ids, state.draft_kv_pages, batch)
        return hidden, replace(state, draft_kv_pages=pages)

    def catch_up(self, state: StepState, batch: Batch, wanted: Wanted) -> StepState:
        """Brings decodes that want drafts so far that ``NEW_ROWS`` are enough: usually at once.

        In tiles, as many rounds as the one that lags most takes.
        """
        slots, size = batch.decode_slots, self.config.chunk_tile

        def missing(state: StepState) -> jax.Array:
            return jnp.where(wanted.num_drafts > 0, wanted.lens - self.lens(state, slots), 0)

        def go_on(state: StepState) -> StepState:
            starts, new = self.lens(state, slots), jnp.clip(missing(state), 0, size)
            chunks = tiles_of(slots, starts, new, size, self.config)
            decodes = tiles_of(slots, starts, jnp.zeros_like(starts), 1, self.config)
            token_ids = jnp.concatenate([jnp.zeros_like(starts), tokens_of(state, slots, chunks)])
            _, state = self.run(state, RaggedBatch(batch.page_table, decodes, chunks), token_ids)
            draft_lens = state.draft_lens.at[slots].set(starts + new, mode="drop")
            return replace(state, draft_lens=draft_lens)

        return jax.lax.while_loop(lambda state: jnp.any(missing(state) >= NEW_ROWS), go_on, state)

    def propose(self, state: StepState, batch: Batch, wanted: Wanted) -> tuple[Drafts, StepState]:
        """Reads the decodes' own tokens and all chunks in one run, then drafts one by one."""
        hidden, state = self._read(state, batch, wanted)
        return draft_in_turn(self, state, batch, hidden, wanted)

    def read_chunks(self, state: StepState, batch: Batch) -> StepState:
        """Reads the batch's chunks, with no row for any decode."""
        slots = batch.decode_slots
        lens = state.lens.at[slots].get(mode="fill", fill_value=0)
        _, state = self._read(state, batch, Wanted(lens, jnp.zeros_like(slots), 0))
        return state

    def _read(self, state: StepState, batch: Batch, wanted: Wanted) -> tuple[jax.Array, StepState]:
        """Returns hidden states [D, E] of the decodes' own tokens, and the state with all read."""
        slots, config = batch.decode_slots, self.config
        starts = self.lens(state, slots)
        new = jnp.where(wanted.num_drafts > 0, wanted.lens + 1 - starts, 0)
        decodes = tiles_of(slots, starts, new, NEW_ROWS, config)
        token_ids = tokens_of(state, slots, decodes)
        chunks = no_tiles(decodes)
        if batch.chunk_slots.shape[0]:
            size = config.chunk_tile
            chunks = tiles_of(batch.chunk_slots, batch.chunk_starts, batch.chunk_lens, size, config)
            token_ids = jnp.concatenate([token_ids, batch.chunk_tokens.reshape(-1)])
            state = self._note_chunks(state, batch)
        hidden, state = self.run(state, RaggedBatch(batch.page_table, decodes, chunks), token_ids)
        return last_rows(hidden, new, NEW_ROWS), state

    def _note_chunks(self, state: StepState, batch: Batch) -> StepState:
        """Sets ``draft_lens`` of slots that have chunks: only those that follow on count."""
        everywhere = jnp.arange(self.config.max_num_seqs, dtype=jnp.int32)
        nothing = jnp.zeros_like(everywhere)
        first = nothing + self.config.max_model_len
        first = first.at[batch.chunk_slots].min(batch.chunk_starts, mode="drop")
        end = nothing.at[batch.chunk_slots].max(batch.chunk_starts + batch.chunk_lens, mode="drop")
        columns = batch.slots
        # The first chunk of an admission: before it is what the prefix cache had.
        is_new = first == columns.cached_lens
        known = jnp.where(is_new, columns.draft_cached_lens, state.draft_lens)
        known = jnp.where(known >= first, end, known)
        return replace(state, draft_lens=jnp.where(end > 0, known, state.draft_lens))
