"""Drafts of a model that runs, one after the other: common to those drafters that are models.

The model draws with the noise that belongs to a position, as the target will: two models that agree
on a token's probability agree on the token. Axis letters: D decodes, K drafts, V vocab, N tiles of
B rows.
"""

from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxinfer.batch import Batch
from jaxinfer.config import EngineConfig
from jaxinfer.sampling import SlotTables, log_distribution, sample, sample_from
from jaxinfer.speculation.drafts import Drafts, Wanted, write_drafts
from jaxinfer.speculation.rejection import DRAFT_NOISE
from jaxinfer.step_state import StepState
from pallas_kernels.ragged_paged_attention import QueryTiles, RaggedBatch


class Runner(Protocol):
    """A model that drafts, with its keys and values."""

    @property
    def model(self) -> Any:
        """Returns the module, whose ``logits`` are over hidden states."""
        ...

    @property
    def config(self) -> EngineConfig:
        """Returns the engine's sizes."""
        ...

    @property
    def vocab_size(self) -> int:
        """Returns the target's, to which the model's logits are cut or padded."""
        ...

    def lens(self, state: StepState, slots: jax.Array) -> jax.Array:
        """Returns of how many tokens of ``slots`` [D] it has keys and values, [D] int32."""
        ...

    def run(
        self, state: StepState, batch: RaggedBatch, token_ids: jax.Array
    ) -> tuple[jax.Array, StepState]:
        """Returns hidden states [T, E], and the state with the keys and values of ``token_ids``."""
        ...


def draft_in_turn(
    runner: Runner, state: StepState, batch: Batch, hidden: jax.Array, wanted: Wanted
) -> tuple[Drafts, StepState]:
    """Drafts from ``hidden`` [D, E] of the decodes' own tokens, then from each draft the next."""
    slots, (lens, num_drafts, max_drafts) = batch.decode_slots, wanted
    draft, logprobs = _choose(runner, hidden, batch, state, slots, lens + 1)
    state = write_drafts(state, slots, lens + 1, draft, num_drafts > 0)

    most = jnp.max(num_drafts)  # no further than somebody wants

    def draft_next(
        carry: tuple[jax.Array, StepState, jax.Array, jax.Array | None],
    ) -> tuple[jax.Array, StepState, jax.Array, jax.Array | None]:
        number, state, drafts, all_logprobs = carry
        goes_on = number < num_drafts
        tiles = tiles_of(slots, lens + number, jnp.where(goes_on, 1, 0), 1, runner.config)
        draft = drafts[:, number - 1]
        ragged = RaggedBatch(batch.page_table, tiles, no_tiles(tiles))
        hidden, state = runner.run(state, ragged, draft)
        following = jnp.where(goes_on, slots, runner.config.max_num_seqs)
        draft, logprobs = _choose(runner, hidden, batch, state, following, lens + number + 1)
        state = write_drafts(state, slots, lens + number + 1, draft, goes_on)
        if all_logprobs is not None:
            all_logprobs = all_logprobs.at[:, number].set(logprobs)
        return number + 1, state, drafts.at[:, number].set(draft), all_logprobs

    drafts = jnp.zeros((*slots.shape, max_drafts), jnp.int32).at[:, 0].set(draft)
    if logprobs is not None:
        everywhere = (*slots.shape, max_drafts, runner.vocab_size)
        logprobs = jnp.zeros(everywhere, logprobs.dtype).at[:, 0].set(logprobs)
    start = (jnp.int32(1), state, drafts, logprobs)
    loop = jax.lax.while_loop(lambda carry: carry[0] < most, draft_next, start)
    _, state, drafts, logprobs = loop
    # The last draft was not fed to the model.
    known = jnp.where(num_drafts > 0, lens + num_drafts, runner.lens(state, slots))
    state = replace(state, draft_lens=state.draft_lens.at[slots].set(known, mode="drop"))
    return Drafts(drafts, num_drafts, logprobs), state


def _choose(
    runner: Runner,
    hidden: jax.Array,
    batch: Batch,
    state: StepState,
    slots: jax.Array,
    at: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the tokens at positions ``at`` [D] after ``hidden`` [D, E], [D] int32.

    For rejection drawn with a noise that is not the target's, and the distributions [D, V].
    """
    logits = runner.model.logits(hidden)[:, : runner.vocab_size]
    missing = runner.vocab_size - logits.shape[1]
    logits = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    tables = SlotTables(state.tokens, state.bias_ids, state.bias_values)
    columns = batch.slots.of(slots).sampling()
    if runner.config.verify == "exact":
        return sample(logits, at, slots, columns, tables), None
    logprobs = log_distribution(logits, at, slots, columns, tables)
    return sample_from(logprobs, at, columns, DRAFT_NOISE), logprobs


def tiles_of(
    slots: jax.Array, starts: jax.Array, lens: jax.Array, rows: int, config: EngineConfig
) -> QueryTiles:
    """Returns a tile for each of ``slots``; one of S is padding."""
    num_slots = config.max_num_seqs
    return QueryTiles(
        sequences=jnp.minimum(slots, num_slots - 1),
        starts=starts,
        lens=jnp.where(slots < num_slots, lens, 0).astype(jnp.int32),
        rows=rows,
    )


def no_tiles(like: QueryTiles) -> QueryTiles:
    """Returns no tile at all, in the types of ``like``."""
    none = like.starts[:0]
    return QueryTiles(none, none, none, 1)


def last_rows(hidden: jax.Array, lens: jax.Array, rows: int) -> jax.Array:
    """Returns ``hidden`` [D * rows, E] of each tile's last token, of ``lens`` [D]: [D, E]."""
    last = jnp.arange(lens.shape[0]) * rows + jnp.maximum(lens - 1, 0)
    return hidden[last]


def tokens_of(state: StepState, slots: jax.Array, tiles: QueryTiles) -> jax.Array:
    """Returns the known tokens at the tiles' positions, [D * rows] int32."""
    tokens = state.tokens.at[slots[:, None], tiles.positions()].get(mode="fill", fill_value=0)
    return tokens.reshape(-1)
