"""Chooses the next token on the device, without a sort and without help from a row's neighbours.

The noise of a token is a pure function of (seed, choice, position, token id), and every quantity a
row is decided by is either element-wise, a maximum or an integer sum. So a request's tokens do not
depend on its batch, on chunking, preemption or speculation. Axis letters: R rows, V vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingColumns:
    """One row a sampled token; see ``request.SamplingParams`` for meanings.

    ``temperature`` [R] float32 (0: greedy), ``top_k`` [R] int32 (0: off), ``top_p`` [R] float32,
    ``seeds`` [R, 2] uint32 (low and high word), ``choices`` [R] int32 (index among n choices).
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seeds: jax.Array
    choices: jax.Array


def sample(logits: jax.Array, positions: jax.Array, columns: SamplingColumns) -> jax.Array:
    """Token ids [R] int32 for ``logits`` [R, V] float32, to stand at ``positions`` [R].

    Greedy rows take the first arg max. Others take arg max(logits / temperature + Gumbel noise)
    over the tokens that top_k and top_p leave, which draws from their softmax (Gumbel 1954).
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_sampled = columns.temperature > 0

    def draw() -> jax.Array:
        temperature = jnp.where(is_sampled, columns.temperature, 1.0)[:, None]
        # Below 0 and at most 0 at the maximum, so that a tiny temperature cannot overflow.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        is_filtered = is_sampled & ((columns.top_k > 0) | (columns.top_p < 1))
        lowest = jnp.full(scaled.shape[:1], jnp.iinfo(jnp.int32).min)
        threshold = jax.lax.cond(
            jnp.any(is_filtered),
            lambda: jnp.where(is_filtered, _threshold(scaled, columns), lowest),
            lambda: lowest,
        )
        survives = _ordered(scaled) >= threshold[:, None]
        noise = gumbel_noise(columns.seeds, columns.choices, positions, logits.shape[-1])
        noisy = jnp.where(survives, scaled + noise, -jnp.inf)
        return jnp.where(is_sampled, jnp.argmax(noisy, axis=-1).astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(is_sampled), draw, lambda: greedy)


def gumbel_noise(
    seeds: jax.Array, choices: jax.Array, positions: jax.Array, vocab_size: int
) -> jax.Array:
    """[R, V] float32 standard Gumbel noise, -log(-log(u)), u from a hash of all that identifies it.

    A keyed integer hash instead of Threefry: 2 mixings a token instead of 20 rounds.
    """
    first = _mix(seeds[:, 0] ^ jnp.uint32(0x243F6A88))
    for word in (seeds[:, 1], choices.astype(jnp.uint32), positions.astype(jnp.uint32)):
        first = _mix(first ^ word) + jnp.uint32(0x9E3779B9)
    second = _mix(first ^ jnp.uint32(0x85A308D3))
    token_ids = jnp.arange(vocab_size, dtype=jnp.uint32)[None, :]
    bits = _mix(_mix(token_ids * jnp.uint32(0x9E3779B9) + first[:, None]) ^ second[:, None])
    # 1 - u in (0, 1), finest near 0 where the winners are; -log(1 - (1 - u)) = -log(u).
    complement = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
    complement = jnp.minimum(complement, jnp.float32(1 - 2**-24))
    return -jnp.log(-jnp.log1p(-complement))


def _mix(x: jax.Array) -> jax.Array:
    """A 32-bit bijection whose output bits each depend on every input bit (lowbias32, Wellons)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _ordered(x: jax.Array) -> jax.Array:
    """int32 that order as the float32 they come from (-0.0 just below 0.0)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _threshold(scaled: jax.Array, columns: SamplingColumns) -> jax.Array:
    """[R] int32: tokens survive whose ordered bits reach it. ``scaled`` [R, V] has maximum 0."""
    vocab_size = scaled.shape[-1]
    ordered = _ordered(scaled)
    top_k = jnp.where(columns.top_k > 0, jnp.minimum(columns.top_k, vocab_size), vocab_size)
    by_count = _largest(lambda bar: jnp.sum(ordered >= bar[:, None], axis=-1) >= top_k, top_k)

    weights = jnp.where(ordered >= by_count[:, None], jnp.exp(scaled), 0.0)
    # Probability mass in integers: a float sum would depend on the order of its terms. The coarse
    # sum bounds the total weight from above, the fine one then stays below 2^31.
    coarse = jnp.sum((weights * 2.0**12).astype(jnp.uint32) + 1, axis=-1)
    fine_scale = jnp.float32(2.0**42) / coarse.astype(jnp.float32)
    mass = (weights * fine_scale[:, None]).astype(jnp.int32)
    total = jnp.sum(mass, axis=-1)
    target = jnp.ceil(columns.top_p * total.astype(jnp.float32)).astype(jnp.int32)
    target = jnp.clip(target, 1, total)

    def holds_mass(bar: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ordered >= bar[:, None], mass, 0), axis=-1) >= target

    by_mass = jax.lax.cond(
        jnp.any(columns.top_p < 1), lambda: _largest(holds_mass, target), lambda: by_count
    )
    return jnp.where(columns.top_p < 1, jnp.maximum(by_count, by_mass), by_count)


def _largest(holds: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The largest int32 for which ``holds`` (true below, false above) by bisection, per row."""
    lowest = jnp.full(like.shape, jnp.iinfo(jnp.int32).min, jnp.int32)
    start = jnp.where(holds(jnp.zeros_like(lowest)), jnp.zeros_like(lowest), lowest)

    def narrow(step: jax.Array, bar: jax.Array) -> jax.Array:
        higher = bar + (jnp.int32(1) << (30 - step))
        return jnp.where(holds(higher), higher, bar)

    return jax.lax.fori_loop(0, 31, narrow, start)
