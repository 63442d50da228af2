"""The model's own first layers that draft, with the keys and values that the target has of them."""

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


class Drafter:
    """Early exit: the head over the hidden states of an inner layer.

    It writes the target's own keys and values; verification writes the same again. So it never
    lags, and has nothing of its own.
    """

    def __init__(self, models: TargetAndDraft, config: EngineConfig) -> None:
        self.model, self.config = models.target, config
        self.vocab_size: int = models.target.model.vocab_size

    def lens(self, state: StepState, slots: jax.Array) -> jax.Array:
        """Returns the target's lengths of ``slots``, [D] int32."""
        return state.lens.at[slots].get(mode="fill", fill_value=0)

    def run(
        self, state: StepState, batch: RaggedBatch, token_ids: jax.Array
    ) -> tuple[jax.Array, StepState]:
        """Runs the first layers. Returns hidden states [T, E] and the state with their pages."""
        num_layers = self.config.num_draft_layers
        hidden, written = self.model(token_ids, state.kv_pages[:num_layers], batch)
        return hidden, replace(state, kv_pages=(*written, *state.kv_pages[num_layers:]))

    def catch_up(self, state: StepState, batch: Batch, wanted: Wanted) -> StepState:
        """Lacks nothing: its pages are the target's."""
        return state

    def propose(self, state: StepState, batch: Batch, wanted: Wanted) -> tuple[Drafts, StepState]:
        """Drafts after each decode's own token, one draft after the other."""
        slots = batch.decode_slots
        starts = self.lens(state, slots)
        new = jnp.where(wanted.num_drafts > 0, wanted.lens + 1 - starts, 0)
        decodes = tiles_of(slots, starts, new, 1, self.config)
        ragged = RaggedBatch(batch.page_table, decodes, no_tiles(decodes))
        hidden, state = self.run(state, ragged, tokens_of(state, slots, decodes))
        return draft_in_turn(self, state, batch, last_rows(hidden, new, 1), wanted)

    def read_chunks(self, state: StepState, batch: Batch) -> StepState:
        """Leaves chunks to the target, whose pages it uses."""
        return state
