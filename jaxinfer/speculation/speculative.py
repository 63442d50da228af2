"""Drafts of the next tokens, and which of them the model would have chosen itself.

A draft is accepted if and only if it equals what the model samples at its position, with the noise
that belongs to that position (drafter-invariant speculation: Daliri, Musco, Suresh 2024). So the
tokens are those of plain decoding, whoever drafts, and however many. Axis letters: D decodes,
K drafts of a step, S slots, M max_model_len.
"""

import jax
import jax.numpy as jnp

# Tokens that a place in the text must have in common with its end.
MAX_NGRAM, MIN_NGRAM = 3, 1


def propose_ngrams(tokens: jax.Array, ends: jax.Array, num_drafts: int) -> tuple[jax.Array, ...]:
    """Prompt lookup (Saxena 2023): what came after the last place that looks like the end.

    ``tokens`` [D, M] int32 of which the first ``ends`` [D] are known, one or more. The place that
    has the most tokens in common with the end is taken, MAX_NGRAM at most, and of these the last.
    What comes after it may run into the end: then it is taken to go on in circles.
    Returns drafts [D, K] int32, and how many of them there are, [D] int32, 0 or K.
    """
    max_len = tokens.shape[1]
    last = ends[:, None] - 1
    places = jnp.arange(max_len, dtype=jnp.int32)[None, :]
    num_common = jnp.zeros(tokens.shape, jnp.int32)
    is_common = places < last
    for back in range(MAX_NGRAM):
        token = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1)
        # What wraps around the beginning is left out.
        is_common &= (jnp.roll(tokens, back, axis=1) == token) & (places >= back)
        num_common += is_common
    best = jnp.max(num_common * max_len + places * (num_common > 0), axis=1, keepdims=True)
    place, is_found = best % max_len, best >= MIN_NGRAM * max_len
    steps = jnp.arange(num_drafts, dtype=jnp.int32)[None, :]
    following = place + 1 + steps % jnp.maximum(last - place, 1)
    drafts = jnp.take_along_axis(tokens, jnp.minimum(following, max_len - 1), axis=1)
    return drafts, jnp.where(is_found[:, 0], num_drafts, 0)


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
