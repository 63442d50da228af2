"""Chooses the next token on the device, without a sort and without help from a row's neighbours.

The noise of a token is a pure function of (seed, choice, position, token id), and every quantity a
row is decided by is either element-wise, a maximum or an integer sum. So a request's tokens do not
depend on its batch, on chunking, preemption or speculation. Axis letters: R rows, V vocab.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer.penalties import adjusted, changes_logits
from jaxinfer.row_log import row_log
from jaxinfer.sampling_columns import SamplingColumns, SlotTables

__all__ = [
    "SamplingColumns",
    "SlotTables",
    "gumbel_noise",
    "log_distribution",
    "sample",
    "sample_from",
]


def sample(
    logits: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    columns: SamplingColumns,
    tables: SlotTables,
) -> jax.Array:
    """Token ids [R] int32 for ``logits`` [R, V] float32, to stand at ``positions`` [R].

    ``slots`` [R] are rows of ``tables``; S or more is a padding row, which means nothing and costs
    nothing. Greedy rows take the first arg max of the logits after penalties, biases and
    ``min_tokens``. Others take arg max(logits / temperature + Gumbel noise) over the tokens that
    top_k, top_p and min_p leave, which draws from their softmax (Gumbel 1954).
    """
    is_sampled = (columns.temperature > 0) & (slots < tables.tokens.shape[0])
    is_changed = changes_logits(positions, slots, columns, tables)

    def choose() -> jax.Array:
        changed = jax.lax.cond(
            jnp.any(is_changed),
            lambda: adjusted(logits, positions, slots, columns, tables),
            lambda: logits,
        )
        greedy = _first_arg_max(changed)
        return jax.lax.cond(
            jnp.any(is_sampled),
            lambda: jnp.where(is_sampled, _draw(changed, positions, columns, is_sampled), greedy),
            lambda: greedy,
        )

    # The outer branch, so that plain greedy rows pay for nothing but this arg max.
    return jax.lax.cond(jnp.any(is_sampled | is_changed), choose, lambda: _first_arg_max(logits))


def log_distribution(
    logits: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    columns: SamplingColumns,
    tables: SlotTables,
) -> jax.Array:
    """[R, V] natural log-probabilities of what ``sample`` draws from; greedy rows have one token.

    -inf for what top_k, top_p and min_p leave out.
    """
    is_sampled = (columns.temperature > 0) & (slots < tables.tokens.shape[0])
    changed = adjusted(logits, positions, slots, columns, tables)
    scaled, survives = _scaled(changed, columns, is_sampled)
    token_ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
    is_first = token_ids == _first_arg_max(changed)[:, None]
    survives = jnp.where(is_sampled[:, None], survives, is_first)
    return jax.nn.log_softmax(jnp.where(survives, scaled, -jnp.inf), axis=-1)


def sample_from(
    logprobs: jax.Array, positions: jax.Array, columns: SamplingColumns, use: int
) -> jax.Array:
    """Token ids [R] int32 drawn from ``logprobs`` [R, V], with the noise of this ``use``."""
    noise = gumbel_noise(columns.seeds, columns.choices, positions, logprobs.shape[-1], use)
    return _first_arg_max(logprobs + noise)


def _first_arg_max(x: jax.Array) -> jax.Array:
    """[R] int32 for ``x`` [R, V]; V - 1 in a row with NaN.

    Two reductions that XLA:CPU vectorizes; it takes ``argmax``, of pairs, element by element.
    """
    last = x.shape[-1] - 1
    token_ids = jnp.arange(last + 1, dtype=jnp.int32)[None, :]
    is_largest = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, token_ids, last), axis=-1)


def _draw(
    logits: jax.Array, positions: jax.Array, columns: SamplingColumns, is_sampled: jax.Array
) -> jax.Array:
    """[R] int32; rows that are not ``is_sampled`` mean nothing."""
    scaled, survives = _scaled(logits, columns, is_sampled)
    noise = gumbel_noise(columns.seeds, columns.choices, positions, logits.shape[-1])
    return _first_arg_max(jnp.where(survives, scaled + noise, -jnp.inf))


def _scaled(
    logits: jax.Array, columns: SamplingColumns, is_sampled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits by temperature, 0 at the maximum, and which tokens the filters leave, [R, V] each."""
    # XLA may flush subnormal numbers to 0, and 0 / 0 would be NaN; so would -inf - -inf.
    tiny, lowest = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).min)
    temperature = jnp.maximum(jnp.where(is_sampled, columns.temperature, 1.0), tiny)[:, None]
    maximum = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), lowest)
    # 0 at the maximum and below 0 elsewhere, so that a tiny temperature cannot overflow upwards.
    scaled = (logits - maximum) / temperature
    uses_top_p = is_sampled & (columns.top_p < 1)
    is_filtered = uses_top_p | (is_sampled & (columns.top_k > 0))
    by_ratio = _ordered(row_log(columns.min_p))  # exp(scaled) >= min_p; all tokens where that is 0
    threshold = jax.lax.cond(
        jnp.any(is_filtered),
        lambda: jnp.where(
            is_filtered, jnp.maximum(_threshold(scaled, columns, uses_top_p), by_ratio), by_ratio
        ),
        lambda: by_ratio,
    )
    return scaled, _ordered(scaled) >= threshold[:, None]


def gumbel_noise(
    seeds: jax.Array, choices: jax.Array, positions: jax.Array, vocab_size: int, use: int = 0
) -> jax.Array:
    """[R, V] float32 standard Gumbel noise, -log(-log(u)), u from a hash of all that identifies it.

    Of another ``use`` it is another noise. A keyed integer hash instead of Threefry: 2 mixings a
    token instead of 20 rounds.
    """
    first = _mix(seeds[:, 0] ^ jnp.uint32(0x243F6A88 + use))
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


def _threshold(scaled: jax.Array, columns: SamplingColumns, uses_top_p: jax.Array) -> jax.Array:
    """[R] int32: tokens that top_k and top_p leave have ordered bits that reach it.

    ``scaled`` [R, V] has maximum 0; ``uses_top_p`` [R] bool.
    """
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
        jnp.any(uses_top_p), lambda: _largest(holds_mass, target), lambda: by_count
    )
    return jnp.where(uses_top_p, jnp.maximum(by_count, by_mass), by_count)


def _largest(holds: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The largest int32 for which ``holds`` (true below, false above) by bisection, per row."""
    lowest = jnp.full(like.shape, jnp.iinfo(jnp.int32).min, jnp.int32)
    start = jnp.where(holds(jnp.zeros_like(lowest)), jnp.zeros_like(lowest), lowest)

    def narrow(step: jax.Array, bar: jax.Array) -> jax.Array:
        higher = bar + (jnp.int32(1) << (30 - step))
        return jnp.where(holds(higher), higher, bar)

    return jax.lax.fori_loop(0, 31, narrow, start)
