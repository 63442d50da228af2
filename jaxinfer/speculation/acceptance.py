"""Verification by equality: drafts that the model would have chosen itself.

A draft is accepted if and only if it equals what the model samples at its position, with the noise
that belongs to that position (drafter-invariant speculation: Daliri, Musco, Suresh 2024). So the
tokens are those of plain decoding, whoever drafts, and however many. Axis letters: D decodes,
K drafts of a step.
"""

import jax
import jax.numpy as jnp


def num_accepted(
    drafts: jax.Array, num_drafts: jax.Array, sampled: jax.Array, ends: jax.Array
) -> jax.Array:
    """Returns how many of ``sampled`` [D, K + 1] are new tokens, [D] int32.

    ``drafts`` [D, K], of which ``num_drafts`` [D] were verified; ``ends`` [D, K + 1] says which of
    ``sampled`` would end the sequence. With x_1 ... x_K the drafts and y_0 ... y_K what the model
    samples after the text and after each draft: y_0 ... y_n are new, n the largest number with
    x_i = y_(i-1) for all i <= n, and nothing comes after an end.
    """
    steps = jnp.arange(drafts.shape[1], dtype=jnp.int32)[None, :]
    is_right = (drafts == sampled[:, :-1]) & (steps < num_drafts[:, None])
    count = 1 + jnp.sum(jnp.cumprod(is_right, axis=1, dtype=jnp.int32), axis=1)
    first_end = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1), ends.shape[1])
    return jnp.minimum(count, first_end + 1).astype(jnp.int32)
