"""The step program: embed, layers over the paged KV cache, logits, sampling, all in one jit.

The device state is donated and carries what decoding needs from step to step, so that the host
never has to send back a token it has only just received, and may send a step before it has read
the one before. A call without chunks can run several steps.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.batch import Batch, BatchShape, packed_size, unpack
from jaxinfer.config import DtypePolicy, EngineConfig
from jaxinfer.logprobs import LogprobColumns, token_logprobs
from jaxinfer.sampling import SlotTables, log_distribution, sample
from jaxinfer.sharding import named_sharding
from jaxinfer.speculation.acceptance import num_accepted
from jaxinfer.speculation.drafter import TargetAndDraft, draft
from jaxinfer.speculation.drafts import Drafts
from jaxinfer.speculation.rejection import after_rejection
from jaxinfer.step_state import NO_TOKEN, StepResult, StepState
from jaxinfer.weights import multiplies_floats
from pallas_kernels.ragged_paged_attention import QueryTiles, RaggedBatch

Parameters = dict[Any, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """The R rows that a step samples from: decodes with their drafts, then one a tile.

    ``logits`` [R, V] float32; ``positions`` [R] of the tokens to be sampled; ``slots`` [R], S for
    padding. ``prompt_logprobs``: of chunks, see ``score_chunks``.
    """

    logits: jax.Array
    positions: jax.Array
    slots: jax.Array
    prompt_logprobs: LogprobColumns


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Verified:
    """The R tokens that a step ``sampled``, [R] int32, and how many of each decode stand.

    ``counts`` [D] int32: that many of a decode's rows, from the first on, are new tokens. They are
    to stand at ``positions`` [R] of ``slots`` [R], S for padding and what does not stand; ``ends``
    [R] bool: it would end its sequence. ``logprobs`` [R] where they are wanted.
    """

    sampled: jax.Array
    positions: jax.Array
    slots: jax.Array
    ends: jax.Array
    counts: jax.Array
    logprobs: LogprobColumns
    prompt_logprobs: LogprobColumns


def ragged_batch(
    batch: Batch, lens: jax.Array, config: EngineConfig, num_drafts: jax.Array, max_drafts: int
) -> RaggedBatch:
    """Describes a batch to attention; decode positions are the slots' lengths.

    ``num_drafts`` [D] of at most ``max_drafts`` drafts come after each decode's own token.
    """
    slots = config.max_num_seqs
    is_decode = batch.decode_slots < slots
    decode_starts = lens.at[batch.decode_slots].get(mode="fill", fill_value=0)
    return RaggedBatch(
        page_table=batch.page_table,
        decodes=QueryTiles(
            sequences=jnp.minimum(batch.decode_slots, slots - 1),
            starts=decode_starts,
            lens=jnp.where(is_decode, 1 + num_drafts, 0),
            rows=1 + max_drafts,
        ),
        chunks=QueryTiles(
            sequences=jnp.minimum(batch.chunk_slots, slots - 1),
            starts=batch.chunk_starts,
            lens=batch.chunk_lens,
            rows=config.chunk_tile,
        ),
    )


def forward(
    model: Any,
    state: StepState,
    batch: Batch,
    config: EngineConfig,
    num_drafts: jax.Array | None = None,
    max_drafts: int = 0,
) -> tuple[jax.Array, RaggedBatch, StepState]:
    """Hidden states [T, E] of all rows, and the state with their keys and values in it.

    Tokens of decodes, ``num_drafts`` drafts included, are in the state's table already, those of
    chunks are put there. Lengths are those of chunks; decodes' stay.
    """
    if num_drafts is None:
        num_drafts = jnp.zeros_like(batch.decode_slots)
    ragged = ragged_batch(batch, state.lens, config, num_drafts, max_drafts)
    decode_tokens = state.tokens.at[batch.decode_slots[:, None], ragged.decodes.positions()].get(
        mode="fill", fill_value=0
    )
    token_ids = jnp.concatenate([decode_tokens.reshape(-1), batch.chunk_tokens.reshape(-1)])
    hidden, kv_pages = model(token_ids, state.kv_pages, ragged)

    chunks = ragged.chunks
    written_slots = jnp.where(
        chunks.is_real(), batch.chunk_slots[:, None], config.max_num_seqs
    )  # [N, B]
    tokens = state.tokens.at[written_slots, chunks.positions()].set(batch.chunk_tokens, mode="drop")
    # A slot may have served another, longer sequence before: its length starts anew.
    lens = state.lens.at[batch.chunk_slots].set(0, mode="drop")
    lens = lens.at[batch.chunk_slots].max(batch.chunk_starts + batch.chunk_lens, mode="drop")
    has_ended = state.has_ended.at[batch.chunk_slots].set(False, mode="drop")
    state = replace(state, kv_pages=kv_pages, tokens=tokens, lens=lens, has_ended=has_ended)
    return hidden, ragged, state


def step(
    graphs: TargetAndDraft,
    config: EngineConfig,
    shape: BatchShape,
    parameters: TargetAndDraft,
    state: StepState,
    packed: jax.Array,
) -> tuple[StepState, StepResult]:
    """One call of the device: one step, or up to ``num_steps`` where the shape has no tiles."""
    models = merged(graphs, parameters)
    batch = unpack(packed, shape, config)
    if shape.num_tiles or config.max_steps_per_call == 1:
        state, result = one_step(models, config, shape, state, batch)
    else:
        state, result = several_steps(models, config, shape, state, batch)
    return state, with_draft_lens(config, state, batch, result)


def merged(graphs: TargetAndDraft, parameters: TargetAndDraft) -> TargetAndDraft:
    """Returns the modules of a step, over its parameters."""
    return TargetAndDraft(
        nnx.merge(graphs.target, parameters.target),
        graphs.draft and nnx.merge(graphs.draft, parameters.draft),
    )


def with_draft_lens(
    config: EngineConfig, state: StepState, batch: Batch, result: StepResult
) -> StepResult:
    """Adds to a result how far the drafter's own pages have come, which the host must know."""
    if not config.drafter.has_pages:
        return result
    slots = jnp.concatenate([batch.decode_slots, batch.chunk_slots])
    draft_lens = state.draft_lens.at[slots].get(mode="fill", fill_value=0)
    return replace(result, draft_lens=draft_lens)


def several_steps(
    models: TargetAndDraft, config: EngineConfig, shape: BatchShape, state: StepState, batch: Batch
) -> tuple[StepState, StepResult]:
    """Up to ``num_steps`` steps of decodes alone, until all have ended or may yield no more."""

    def is_going_on(carry: tuple[jax.Array, jax.Array, StepState, StepResult]) -> jax.Array:
        done, left, state, _ = carry
        is_decode = (batch.decode_slots < config.max_num_seqs) & (left > 0)
        has_ended = state.has_ended.at[batch.decode_slots].get(mode="fill", fill_value=True)
        return (done < batch.num_steps) & jnp.any(is_decode & ~has_ended)

    def go_on(
        carry: tuple[jax.Array, jax.Array, StepState, StepResult],
    ) -> tuple[jax.Array, jax.Array, StepState, StepResult]:
        done, left, state, results = carry
        state, result = one_step(models, config, shape, state, replace(batch, max_tokens=left))
        new = result.tokens[0, : shape.num_decode_rows].reshape(shape.num_decodes, -1)
        left = left - jnp.sum(new != NO_TOKEN, axis=1, dtype=jnp.int32)
        tokens = results.tokens.at[done].set(result.tokens[0])
        drafted = results.num_drafted.at[done].set(result.num_drafted[0])
        return done + 1, left, state, replace(result, tokens=tokens, num_drafted=drafted)

    nothing = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(lambda: one_step(models, config, shape, state, batch)[1]),
    )
    num_calls = config.max_steps_per_call
    nothing = replace(
        nothing,
        tokens=jnp.full((num_calls, shape.num_logits_rows), NO_TOKEN, jnp.int32),
        num_drafted=jnp.zeros((num_calls, shape.num_decodes), jnp.int32),
    )
    start = (jnp.int32(0), batch.max_tokens, state, nothing)
    *_, state, results = jax.lax.while_loop(is_going_on, go_on, start)
    return state, results


def one_step(
    models: TargetAndDraft, config: EngineConfig, shape: BatchShape, state: StepState, batch: Batch
) -> tuple[StepState, StepResult]:
    """Runs one step: draft, verify, accept. Decodes that may yield no more are padding."""
    batch = without_ended(config, state, batch)
    drafts, state = draft(models, config, shape, state, batch)
    verified, state = verify(models.target, config, shape, state, batch, drafts)
    return accept(config, state, batch, drafts, verified)


def without_ended(config: EngineConfig, state: StepState, batch: Batch) -> Batch:
    """The batch with decodes as padding that have ended or may yield no more."""
    is_done = state.has_ended.at[batch.decode_slots].get(mode="fill", fill_value=True)
    is_done |= batch.max_tokens <= 0
    decode_slots = jnp.where(is_done, config.max_num_seqs, batch.decode_slots)
    return replace(batch, decode_slots=decode_slots)


def verify(
    model: Any,
    config: EngineConfig,
    shape: BatchShape,
    state: StepState,
    batch: Batch,
    drafts: Drafts,
) -> tuple[Verified, StepState]:
    """Runs the target over all rows, those of drafts included, and samples a token after each.

    Returns how many of them stand, and the state with the rows' keys and values.
    """
    scores, state = score(model, config, shape, state, batch, drafts)
    columns = batch.slots.of(scores.slots)
    sampled = _sampled(shape, state, batch, drafts, scores)
    ends = jnp.any(sampled[:, None] == columns.ending_ids, axis=1)
    ends &= scores.positions - columns.prompt_lens >= columns.min_tokens
    ends |= scores.positions + 1 >= columns.end_positions
    slots, counts = scores.slots, jnp.ones_like(batch.decode_slots)
    if shape.num_drafts:
        # Of a decode's rows those that are new tokens are real, the others padding.
        by_decode = shape.num_decodes, shape.num_drafts + 1
        rows = slice(shape.num_decode_rows)
        counts = num_accepted(
            drafts.token_ids,
            drafts.num_drafts,
            sampled[rows].reshape(by_decode),
            ends[rows].reshape(by_decode),
        )
        is_new = jnp.arange(shape.num_drafts + 1)[None, :] < counts[:, None]
        new_slots = jnp.where(is_new.reshape(-1), slots[rows], config.max_num_seqs)
        slots = slots.at[rows].set(new_slots)
    is_real = slots < config.max_num_seqs
    verified = Verified(
        sampled=sampled,
        positions=scores.positions,
        slots=slots,
        ends=ends,
        counts=counts,
        logprobs=token_logprobs(scores.logits, sampled, is_real & (columns.num_logprobs >= 0)),
        prompt_logprobs=scores.prompt_logprobs,
    )
    return verified, state


def score(
    model: Any,
    config: EngineConfig,
    shape: BatchShape,
    state: StepState,
    batch: Batch,
    drafts: Drafts,
) -> tuple[Scores, StepState]:
    """Runs the target over all rows and returns the logits of those that are sampled from."""
    hidden, ragged, state = forward(
        model, state, batch, config, drafts.num_drafts, shape.num_drafts
    )
    last = jnp.maximum(batch.chunk_lens - 1, 0)
    tile_rows = shape.num_decode_rows + jnp.arange(shape.num_tiles) * config.chunk_tile + last
    logits_rows = jnp.concatenate([jnp.arange(shape.num_decode_rows), tile_rows])
    num_slots = config.max_num_seqs
    chunk_slots = jnp.where(batch.chunk_samples > 0, batch.chunk_slots, num_slots)
    decode_slots = jnp.where(ragged.decodes.is_real(), batch.decode_slots[:, None], num_slots)
    scores = Scores(
        logits=model.logits(hidden[logits_rows]),
        positions=ragged.positions()[logits_rows] + 1,
        slots=jnp.concatenate([decode_slots.reshape(-1), chunk_slots]),
        prompt_logprobs=score_chunks(model, hidden[shape.num_decode_rows :], batch),
    )
    return scores, state


def _sampled(
    shape: BatchShape, state: StepState, batch: Batch, drafts: Drafts, scores: Scores
) -> jax.Array:
    """Returns the target's choice in each row, [R] int32; by rejection, what stands there."""
    logits, positions, slots = scores.logits, scores.positions, scores.slots
    columns = batch.slots.of(slots).sampling()
    tables = SlotTables(state.tokens, state.bias_ids, state.bias_values)
    sampled = sample(logits, positions, slots, columns, tables)
    if drafts.logprobs is None:
        return sampled
    rows = slice(shape.num_decode_rows)
    of_rows = jax.tree.map(lambda column: column[rows], columns)
    logprobs = log_distribution(logits[rows], positions[rows], slots[rows], of_rows, tables)
    by_decode = shape.num_decodes, shape.num_drafts + 1
    of_decodes = batch.slots.of(batch.decode_slots)
    chosen = after_rejection(
        drafts,
        logprobs.reshape(*by_decode, -1),
        sampled[rows].reshape(by_decode),
        positions[rows].reshape(by_decode),
        of_decodes.seeds,
        of_decodes.choices,
    )
    return sampled.at[rows].set(chosen.reshape(-1))


def accept(
    config: EngineConfig, state: StepState, batch: Batch, drafts: Drafts, verified: Verified
) -> tuple[StepState, StepResult]:
    """Keeps the tokens that stand, and forgets what was computed for the others."""
    slots, counts = verified.slots, verified.counts
    if config.drafter.has_pages:
        # Of what the drafter has been fed, that many tokens are real.
        accepted = state.lens.at[batch.decode_slots].get(mode="fill", fill_value=0) + counts
        draft_lens = state.draft_lens.at[batch.decode_slots].min(accepted, mode="drop")
        state = replace(state, draft_lens=draft_lens)
    # Of a slot's rows only the last new one may end it: its others are written as not ended.
    ended = state.has_ended.at[slots].max(verified.ends, mode="drop")
    tokens = state.tokens.at[slots, verified.positions].set(verified.sampled, mode="drop")
    state = replace(
        state,
        tokens=tokens,
        lens=state.lens.at[batch.decode_slots].add(counts, mode="drop"),
        has_ended=ended,
    )
    is_real = slots < config.max_num_seqs
    return state, StepResult(
        tokens=jnp.where(is_real, verified.sampled, NO_TOKEN)[None],
        num_drafted=drafts.num_drafts[None],
        draft_lens=jnp.zeros(0, jnp.int32),
        logprobs=verified.logprobs,
        prompt_logprobs=verified.prompt_logprobs,
    )


def score_chunks(model: Any, hidden: jax.Array, batch: Batch) -> LogprobColumns:
    """[N, B] log-probabilities of the token after each chunk row, in tiles that want them.

    ``hidden`` [N * B, E]. One tile at a time: its logits are [B, V] float32. Always in whole tiles,
    so that a row's bits do not depend on the chunk it came in.
    """
    following = jnp.concatenate([batch.chunk_tokens[:, 1:], batch.chunk_next[:, None]], axis=1)
    ends = jnp.arange(following.shape[1])[None, :] == batch.chunk_lens[:, None] - 1
    following = jnp.where(ends, batch.chunk_next[:, None], following)
    num_tiles, size = following.shape

    def score(rows: jax.Array, wanted: jax.Array) -> LogprobColumns:
        return token_logprobs(model.logits(rows), wanted, jnp.ones(size, bool))

    rows = hidden.reshape(num_tiles, size, hidden.shape[-1])
    first_rows = jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)
    shapes = jax.eval_shape(score, first_rows, jax.ShapeDtypeStruct((size,), jnp.int32))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if not num_tiles:
        return jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), shapes)

    def score_tile(tile: tuple[jax.Array, jax.Array, jax.Array]) -> LogprobColumns:
        rows, wanted, is_scored = tile
        return jax.lax.cond(is_scored > 0, score, lambda *_: zeros, rows, wanted)

    return jax.lax.map(score_tile, (rows, following, batch.chunk_scores))


def compiler_options(
    platform: str, dtypes: DtypePolicy, batch_invariant: bool = True
) -> dict[str, str]:
    """XLA options of a step. On CPU in float32 they make a row's bits independent of its batch.

    YNN kernels, XLA:CPU's default, pick another blocking of float products for 1, 2-32 and more
    rows; they are taken where ``batch_invariant`` is not asked for. Products of integers need them
    (a tenth of the time), and sums of integers have the same bits in every blocking.
    """
    is_float = multiplies_floats(dtypes) and dtypes.weights == "float32"
    if platform == "cpu" and is_float and batch_invariant:
        return {"xla_cpu_experimental_ynn_fusion_type": ""}
    return {}


def lower(
    graphs: TargetAndDraft,
    config: EngineConfig,
    shape: BatchShape,
    parameters: TargetAndDraft,
    state: StepState,
    mesh: Mesh,
) -> Any:
    """Lowers ``step`` for one batch shape, ready to compile; nothing is allocated.

    ``parameters`` and ``state`` are abstract, with shardings.
    """
    whole = named_sharding(mesh)
    packed = jax.ShapeDtypeStruct((packed_size(shape, config),), np.int32, sharding=whole)
    jitted = jax.jit(
        step,
        static_argnums=(0, 1, 2),
        donate_argnums=(4,),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), whole),
    )
    # Kernels ask for which device they are lowered: it need not be one of this machine.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.trace(graphs, config, shape, parameters, state, packed).lower()
