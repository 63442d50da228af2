"""Changes logits before anything is drawn: penalties, biases, endings that would come too early.

What a row gets depends on its own tokens only: they are counted in integers, and everything else
is element-wise. Axis letters: R rows, V vocab, S slots, M max_model_len.
"""

import jax
import jax.numpy as jnp

from jaxinfer.sampling_columns import SamplingColumns, SlotTables

COUNT_BLOCK_TOKENS = 128


def changes_logits(
    positions: jax.Array, slots: jax.Array, columns: SamplingColumns, tables: SlotTables
) -> jax.Array:
    """[R] bool: the rows whose logits ``adjusted`` changes; never a padding row."""
    return (slots < tables.tokens.shape[0]) & (
        _has_penalties(columns) | (columns.num_biases > 0) | _is_short(positions, columns)
    )


def adjusted(
    logits: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    columns: SamplingColumns,
    tables: SlotTables,
) -> jax.Array:
    """[R, V] float32: ``logits`` after penalties, biases and ``min_tokens``, in this order.

    ``positions`` [R] is where the new token will stand: tokens before it count. Never NaN when
    ``logits`` are not.
    """
    is_penalised = (slots < tables.tokens.shape[0]) & _has_penalties(columns)
    logits = jax.lax.cond(
        jnp.any(is_penalised),
        lambda: _penalised(logits, jnp.where(is_penalised, positions, 0), slots, columns, tables),
        lambda: logits,
    )
    # Both by one scatter, a few hundred additions a row: cheaper than a branch around it, which
    # copies the logits.
    num_slots, num_biases = tables.bias_ids.shape
    slots_read = jnp.minimum(slots, num_slots - 1)  # a padding row reads another's, and uses none
    is_bias = jnp.arange(num_biases, dtype=jnp.int32)[None, :] < columns.num_biases[:, None]
    is_bias &= (slots < num_slots)[:, None]
    is_ending = _is_short(positions, columns)[:, None] & (columns.ending_ids >= 0)
    vocab_size = logits.shape[1]
    token_ids = jnp.concatenate(
        [
            jnp.where(is_bias, tables.bias_ids[slots_read], vocab_size),  # out of bounds: dropped
            jnp.where(is_ending, columns.ending_ids, vocab_size),
        ],
        axis=1,
    )
    endings = jnp.full(is_ending.shape, -jnp.inf, jnp.float32)
    added = jnp.concatenate([tables.bias_values[slots_read], endings], axis=1)
    return logits.at[_rows(token_ids), token_ids].add(added, mode="drop")


def _has_penalties(columns: SamplingColumns) -> jax.Array:
    """[R] bool; a repetition penalty of 0 is a padding row's."""
    return (
        ((columns.repetition_penalty != 1) & (columns.repetition_penalty > 0))
        | (columns.presence_penalty != 0)
        | (columns.frequency_penalty != 0)
    )


def _is_short(positions: jax.Array, columns: SamplingColumns) -> jax.Array:
    """[R] bool: the new token would not be the ``min_tokens``-th yet, or later ones."""
    return positions - columns.prompt_lens < columns.min_tokens


def _penalised(
    logits: jax.Array,
    ends: jax.Array,
    slots: jax.Array,
    columns: SamplingColumns,
    tables: SlotTables,
) -> jax.Array:
    """Repetition, presence and frequency penalties for the tokens before ``ends`` [R]."""
    marks = _marks(logits.shape[1], ends, slots, columns.prompt_lens, tables.tokens)
    repetition = columns.repetition_penalty[:, None]
    repetition = jnp.where((marks > 0) & (repetition > 0), repetition, 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    counts = (marks >> 1).astype(jnp.float32)
    logits = logits - jnp.where(counts > 0, columns.presence_penalty[:, None], 0.0)
    logits = logits - columns.frequency_penalty[:, None] * counts
    # A tiny or huge repetition penalty overflows, and the difference of infinities would be NaN.
    largest = float(jnp.finfo(jnp.float32).max)
    return jnp.clip(logits, -largest, largest)


def _marks(
    vocab_size: int, ends: jax.Array, slots: jax.Array, prompt_lens: jax.Array, tokens: jax.Array
) -> jax.Array:
    """[R, V] int32: 2 * (times in the output) + (1 if in the prompt), of tokens before ``ends``.

    By blocks of positions up to the last end, so a short sequence does not pay for a large M. In
    a row the prompt comes first: the maximum with 1 never meets a count of the output.
    """
    max_len = tokens.shape[1]
    block = min(COUNT_BLOCK_TOKENS, max_len)
    slots = jnp.minimum(slots, tokens.shape[0] - 1)

    def count_block(index: jax.Array, marks: jax.Array) -> jax.Array:
        # The last block may reach back into the one before it, whose tokens are left out.
        start = jnp.minimum(index * block, max_len - block)
        at = (start + jnp.arange(block, dtype=jnp.int32))[None, :]
        token_ids = jax.lax.dynamic_slice_in_dim(tokens, start, block, axis=1)[slots]
        is_known = (at >= index * block) & (at < ends[:, None])
        is_prompt = at < prompt_lens[:, None]
        rows = _rows(token_ids)
        in_prompt = jnp.where(is_known & is_prompt, token_ids, vocab_size)
        in_output = jnp.where(is_known & ~is_prompt, token_ids, vocab_size)
        marks = marks.at[rows, in_prompt].max(1, mode="drop")
        return marks.at[rows, in_output].add(2, mode="drop")

    num_blocks = (jnp.max(ends) + block - 1) // block
    none = jnp.zeros((ends.shape[0], vocab_size), jnp.int32)
    return jax.lax.fori_loop(0, num_blocks, count_block, none)


def _rows(token_ids: jax.Array) -> jax.Array:
    """Row numbers for ``token_ids`` [R, N], of their shape."""
    return jax.lax.broadcasted_iota(jnp.int32, token_ids.shape, 0)
