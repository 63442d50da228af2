"""Log-probabilities of tokens under the model itself: before penalties, temperature and filters.

A row's bits do not depend on the other rows: floats are added in an order that only V decides.
Axis letters: R rows, V vocab.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.request import LIMITS
from jaxinfer.row_log import row_log

# As many as a request may ask for.
NUM_TOP = int(LIMITS["logprobs"].high)
SUM_BLOCK_TOKENS = 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogprobColumns:
    """One row a token; see ``schedule.TokenLogprobs``.

    ``logprob`` [R] float32 in nats, ``rank`` [R] int32 (1: the most probable), ``top_ids`` [R, K]
    int32 and ``top_logprobs`` [R, K] float32: the K = min(20, V) most probable tokens, best first.
    """

    logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def token_logprobs(logits: jax.Array, token_ids: jax.Array, is_wanted: jax.Array) -> LogprobColumns:
    """Returns log-probabilities and ranks that ``logits`` [R, V] float32 give ``token_ids`` [R].

    Rows that are not ``is_wanted`` [R] bool mean nothing; if none is, all is zeros and costs
    nothing. Equal logits have the same rank, and in the top the lowest id comes first.
    """
    rows, num_top = logits.shape[0], min(NUM_TOP, logits.shape[1])

    def compute() -> LogprobColumns:
        maximum = jnp.max(logits, axis=-1, keepdims=True)
        sums = _sum_of_exponentials(logits, maximum)
        log_sums = row_log(sums[:, 0])[:, None]
        chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1, mode="clip")
        top_logits, top_ids = jax.lax.top_k(logits, num_top)
        return LogprobColumns(
            logprob=(chosen - maximum - log_sums)[:, 0],
            rank=1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32),
            top_ids=top_ids.astype(jnp.int32),
            top_logprobs=top_logits - maximum - log_sums,
        )

    def nothing() -> LogprobColumns:
        return LogprobColumns(
            logprob=jnp.zeros((rows,), jnp.float32),
            rank=jnp.zeros((rows,), jnp.int32),
            top_ids=jnp.zeros((rows, num_top), jnp.int32),
            top_logprobs=jnp.zeros((rows, num_top), jnp.float32),
        )

    return jax.lax.cond(jnp.any(is_wanted), compute, nothing)


def _sum_of_exponentials(logits: jax.Array, maximum: jax.Array) -> jax.Array:
    """[R, 1]: sum over V of exp(logits - maximum), always in the same order.

    Blocks of V are added up element by element, one after the other, then a tree adds halves. A
    reduction's order would depend on the number of rows.
    """
    vocab_size = logits.shape[1]
    block = min(SUM_BLOCK_TOKENS, vocab_size)

    def add_block(index: jax.Array, total: jax.Array) -> jax.Array:
        # The last block may reach back into the one before it, whose tokens are left out.
        start = jnp.minimum(index * block, vocab_size - block)
        token_ids = start + jnp.arange(block, dtype=jnp.int32)
        is_new = (token_ids >= index * block)[None, :]
        values = jax.lax.dynamic_slice_in_dim(logits, start, block, axis=1)
        return total + jnp.where(is_new, jnp.exp(values - maximum), 0.0)

    start = jnp.zeros((logits.shape[0], block), jnp.float32)
    total = jax.lax.fori_loop(0, -(-vocab_size // block), add_block, start)
    while (size := total.shape[1]) > 1:
        half = size // 2
        halves = total[:, :half] + total[:, half : 2 * half]
        rest = total[:, 2 * half :]  # one column where the size is odd
        total = halves if size % 2 == 0 else jnp.concatenate([halves, rest], axis=1)
    return total
