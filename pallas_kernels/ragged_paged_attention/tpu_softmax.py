"""One block of keys and values against some query rows, on the units of a TPU core.

Axis letters: M query rows of a kv head, B tokens a block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.packed_pages import PackedKVPages
from pallas_kernels.ragged_paged_attention.tiles import MASKED
from pallas_kernels.ragged_paged_attention.tpu_tile import Scratch, Tile

LOG2_E = math.log2(math.e)


def attend_rows(
    tile: Tile,
    block: Any,
    head: Any,
    rows: Any,
    row_offsets: Any,
    queries: Any,
    fetched: PackedKVPages,
    scratch: Scratch,
) -> None:
    """Takes a block into the running softmax of some rows of a kv head (Milakov, Gimelshein 2018).

    ``rows``: a slice of the M query rows. Refs as ``attend_tile`` has them.
    """
    shape = tile.shape
    query_rows = queries[0, head, rows]  # [rows, lanes]
    precision = jax.lax.Precision.HIGHEST if query_rows.dtype == jnp.float32 else None
    keys = _matrix(fetched, head if shape.shares_row else 2 * head, query_rows.dtype)
    values = keys if shape.shares_row else _matrix(fetched, 2 * head + 1, query_rows.dtype)
    scores = jax.lax.dot_general(
        query_rows,
        keys,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    # In powers of two: exp is exp2 and a product, and the product is part of the scale.
    cap = shape.logit_soft_cap
    scale = shape.scale * LOG2_E if cap is None else shape.scale / cap
    scores = scores * (scale * _scales(fetched, 2 * head))
    if cap is not None:
        scores = jnp.tanh(scores) * (cap * LOG2_E)
    positions = jnp.minimum(tile.start + row_offsets[rows], tile.kv_len - 1)  # [rows, 1]
    key_positions = block * shape.block_tokens + jax.lax.broadcasted_iota(
        jnp.int32, scores.shape, 1
    )
    visible = key_positions <= positions
    if shape.sliding_window is not None:
        visible &= key_positions > positions - shape.sliding_window
    scores = jnp.where(visible, scores, MASKED)

    maximum, denominator, accumulator = (
        running.at[head, rows]
        for running in (scratch.maximum, scratch.denominator, scratch.accumulator)
    )
    # Every lane of a row has its maximum, and a part of its denominator: sums and maxima over
    # lanes, and broadcasts to them, all go through one unit, which is the busiest here.
    width = maximum.shape[-1]
    columns = [scores[:, first : first + width] for first in range(0, scores.shape[1], width)]
    old = maximum[...]
    highest = jnp.max(functools.reduce(jnp.maximum, columns), axis=1, keepdims=True)
    new = jnp.maximum(old, jnp.broadcast_to(highest, old.shape))
    weights = [jnp.exp2(column - new) for column in columns]
    correction = jnp.exp2(old - new)
    maximum[...] = new
    denominator[...] = denominator[...] * correction + functools.reduce(jnp.add, weights)
    products = jax.lax.dot_general(
        (jnp.concatenate(weights, axis=1) * _scales(fetched, 2 * head + 1)).astype(values.dtype),
        values,
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    accumulator[...] = accumulator[...] * _to_lanes(correction, products.shape[1]) + products


def _to_lanes(rows: jax.Array, lanes: int) -> jax.Array:
    """[M, width], the lanes of a row all equal -> [M, lanes]."""
    width = rows.shape[1]
    if lanes % width:
        return rows[:, :1]
    return jnp.concatenate([rows] * (lanes // width), axis=1)


def _matrix(fetched: PackedKVPages, matrix: Any, dtype: jnp.dtype) -> jax.Array:
    """[B, lanes]: one matrix of the block's pages, without its scales."""
    rows = fetched.pages[:, matrix]  # [pages a block, page_size, lanes]
    if rows.dtype == jnp.uint8:
        rows = pltpu.bitcast(rows, jnp.float8_e4m3fn)
    return rows.reshape(-1, rows.shape[-1]).astype(dtype)


def _scales(fetched: PackedKVPages, row: Any) -> jax.Array | float:
    """[1, B]: a row of the block's scales; 1 where there are none."""
    if fetched.scales is None:
        return 1.0
    pages = fetched.scales.shape[0]
    rows = pl.ds(row, 1)
    return jnp.concatenate([fetched.scales[place, rows] for place in range(pages)], axis=1)
