"""Blocked attention in plain XLA: query tiles against KV blocks with a running softmax.

Runs anywhere. Five rules make a row's bits independent of its neighbours on XLA:CPU; three of them
are kept here (the other two, at least 8 rows and a compiler option, by the step): no rows of a
product are left over, see row_blocks.py;
KV blocks have a fixed number of tokens and a dynamic trip count, so a row meets the same blocks
whatever else is in the batch; and the softmax denominator is a tree of additions, since a
reduction is vectorized differently for different row counts, and so is a product with ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.quantized_rows import (
    as_floats,
    dequantize_rows,
    is_quantized,
    quantize_rows,
)
from pallas_kernels.ragged_paged_attention.tiles import (
    MASKED,
    QueryTiles,
    RaggedBatch,
    check_kv_pages,
)
from pallas_kernels.row_blocks import padded_rows

# It runs anywhere.
PLATFORMS: frozenset[str] | None = None

KV_BLOCK_TOKENS = 128


class TransposedKVPages(NamedTuple):
    """A layer's ``keys`` [pages, G, D, page_size] and ``values`` [pages, G, page_size, D].

    Kv heads come before tokens, so that a gathered block is one matrix a head, and keys lie
    transposed, as the product with queries wants them: see docs/log.md for what else was measured.
    Those of one byte have scales [pages, G, page_size], see quantized_rows.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None


def abstract_kv_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    device_kind: str,
) -> TransposedKVPages:
    """Shapes of a layer's pages."""
    keys: Any = jax.ShapeDtypeStruct((num_pages, num_kv_heads, head_dim, page_size), dtype)
    values: Any = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size, head_dim), dtype)
    if not is_quantized(dtype):
        return TransposedKVPages(keys, values)
    scales: Any = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size), jnp.float32)
    return TransposedKVPages(keys, values, scales, scales)


def from_logical(
    keys: jax.Array, values: jax.Array, dtype: jax.typing.DTypeLike | None = None
) -> TransposedKVPages:
    """Pages of this form; keys and values [pages, G, page_size, D]. ``dtype``: quantized to it."""
    if dtype is None or not is_quantized(dtype):
        return TransposedKVPages(keys.swapaxes(2, 3), values)
    (keys, key_scales), (values, value_scales) = (quantize_rows(x, dtype) for x in (keys, values))
    return TransposedKVPages(keys.swapaxes(2, 3), values, key_scales, value_scales)


def to_logical(kv_pages: TransposedKVPages, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of ``from_logical``."""
    keys, values = kv_pages.keys.swapaxes(2, 3), kv_pages.values
    if kv_pages.key_scales is None or kv_pages.value_scales is None:
        return keys, values
    return (
        dequantize_rows(keys, kv_pages.key_scales),
        dequantize_rows(values, kv_pages.value_scales),
    )


def ragged_paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_pages: TransposedKVPages,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    logit_soft_cap: float | None,
) -> tuple[jax.Array, TransposedKVPages]:
    """Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022); see the package."""
    if not isinstance(kv_pages, TransposedKVPages):
        raise NotImplementedError(f"pages are {type(kv_pages).__name__}")
    num_pages, _, page_size, _ = kv_pages.values.shape
    _, num_kv_heads, head_dim = keys.shape
    form = abstract_kv_pages(num_pages, page_size, num_kv_heads, head_dim, kv_pages.keys.dtype, "")
    check_kv_pages(kv_pages, form)
    kv_pages = _write(kv_pages, keys, values, batch)
    outputs, row = [], 0
    for tiles in (batch.decodes, batch.chunks):
        if tiles.num_rows:
            outputs.append(
                _attend(
                    queries[row : row + tiles.num_rows],
                    kv_pages,
                    batch.page_table,
                    tiles,
                    scale,
                    sliding_window,
                    logit_soft_cap,
                )
            )
        row += tiles.num_rows
    return jnp.concatenate(outputs).astype(queries.dtype), kv_pages


def _write(
    kv_pages: TransposedKVPages, keys: jax.Array, values: jax.Array, batch: RaggedBatch
) -> TransposedKVPages:
    """Scatters the new rows [T, G, D] to their pages; in place when ``kv_pages`` is donated."""
    key_pages, value_pages, key_scales, value_scales = kv_pages
    num_pages, _, page_size, _ = value_pages.shape
    positions, is_real = batch.positions(), batch.is_real()
    page_indices = jnp.minimum(positions // page_size, batch.page_table.shape[1] - 1)
    pages = batch.page_table[batch.sequences(), page_indices]
    pages = jnp.where(is_real, pages, num_pages)  # out of bounds: dropped
    offsets = positions % page_size
    if key_scales is not None and value_scales is not None:
        keys, new_key_scales = quantize_rows(keys, key_pages.dtype)
        values, new_value_scales = quantize_rows(values, value_pages.dtype)
        key_scales = key_scales.at[pages, :, offsets].set(new_key_scales, mode="drop")
        value_scales = value_scales.at[pages, :, offsets].set(new_value_scales, mode="drop")
    return TransposedKVPages(
        key_pages.at[pages, :, :, offsets].set(keys.astype(key_pages.dtype), mode="drop"),
        value_pages.at[pages, :, offsets].set(values.astype(value_pages.dtype), mode="drop"),
        key_scales,
        value_scales,
    )


def _attend(
    queries: jax.Array,
    kv_pages: TransposedKVPages,
    page_table: jax.Array,
    tiles: QueryTiles,
    scale: float,
    sliding_window: int | None,
    logit_soft_cap: float | None,
) -> jax.Array:
    """[N * rows, H, D] queries of equal tiles -> outputs of that shape, float32.

    Tiles are taken one after the other, each over its own blocks only: padding costs nothing, and
    a long sequence nothing to its neighbours. (All tiles as one batch up to the longest: 100 ms
    against 13 ms for one decode at 1,024 tokens beside seven padding rows, 30 layers.)
    """
    _, num_heads, head_dim = queries.shape
    key_pages, value_pages, key_scales, value_scales = kv_pages
    _, num_kv_heads, page_size, _ = value_pages.shape
    # Of quantized pages: what is stored is multiplied as floats, scales with what comes of it.
    dtype = queries.dtype if key_scales is not None else value_pages.dtype
    group = num_heads // num_kv_heads
    num_tiles = tiles.starts.shape[0]
    # [N, G, group * rows, D]: the query heads of a kv head share its keys as more rows.
    grouped = queries.reshape(num_tiles, tiles.rows, num_kv_heads, group, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(num_tiles, num_kv_heads, -1, head_dim)
    grouped = grouped * jnp.asarray(scale, grouped.dtype)
    query_positions = jnp.tile(tiles.positions(), (1, group))  # [N, group * rows]
    num_rows = group * tiles.rows
    padding = padded_rows(num_rows) - num_rows
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padding), (0, 0)))
    query_positions = jnp.pad(query_positions, ((0, 0), (0, padding)))

    pages_per_block = max(1, KV_BLOCK_TOKENS // page_size)
    block_tokens = pages_per_block * page_size
    missing = -page_table.shape[1] % pages_per_block  # dynamic_slice would clamp, not pad
    tables = jnp.pad(page_table, ((0, 0), (0, missing)))[tiles.sequences]  # [N, P]
    is_real = tiles.lens > 0
    num_blocks = jnp.where(is_real, (tiles.starts + tiles.lens - 1) // block_tokens + 1, 0)
    first_blocks = jnp.zeros_like(num_blocks)
    if sliding_window is not None:
        # Blocks that no row of a tile sees. Not to meet them changes no bit: what a row gathers
        # before its first visible key is multiplied by 0.
        first_blocks = jnp.maximum(tiles.starts - sliding_window + 1, 0) // block_tokens
    row_shape = grouped.shape[1:-1]

    def of_block(scales: jax.Array, pages: jax.Array) -> jax.Array:
        """[pages, G, page_size] -> [G, 1, K]."""
        return scales[pages].transpose(1, 0, 2).reshape(num_kv_heads, 1, block_tokens)

    def attend_tile(tile: jax.Array, outputs: jax.Array) -> jax.Array:
        tile_queries, table, positions = grouped[tile], tables[tile], query_positions[tile]

        def attend_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            maximum, denominator, accumulator = carry
            first = index * pages_per_block
            pages = jax.lax.dynamic_slice_in_dim(table, first, pages_per_block)
            # Gathered, then transposed: fused into one loop it takes 17 us a block against 8.
            block_keys = jax.lax.optimization_barrier(key_pages[pages])
            block_keys = block_keys.transpose(1, 2, 0, 3)  # [G, D, pages, page_size]
            block_keys = block_keys.reshape(num_kv_heads, head_dim, block_tokens)
            block_values = value_pages[pages].transpose(1, 0, 2, 3)  # [G, pages, page_size, D]
            block_values = block_values.reshape(num_kv_heads, block_tokens, head_dim)
            scores = jnp.einsum(
                "gmd,gdk->gmk",
                tile_queries,
                as_floats(block_keys, dtype),
                preferred_element_type=jnp.float32,
            )
            if key_scales is not None:
                scores = scores * of_block(key_scales, pages)
            if logit_soft_cap is not None:
                scores = logit_soft_cap * jnp.tanh(scores / logit_soft_cap)
            key_positions = index * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)
            visible = key_positions[None, :] <= positions[:, None]
            if sliding_window is not None:
                visible &= key_positions[None, :] > positions[:, None] - sliding_window
            scores = jnp.where(visible[None], scores, MASKED)
            new_maximum = jnp.maximum(maximum, _fold(jnp.maximum, scores))
            weights = jnp.exp(scores - new_maximum)
            correction = jnp.exp(maximum - new_maximum)
            scaled = weights
            if value_scales is not None:
                scaled = weights * of_block(value_scales, pages)
            block_output = jnp.einsum(
                "gmk,gkd->gmd",
                scaled.astype(dtype),
                as_floats(block_values, dtype),
                preferred_element_type=jnp.float32,
            )
            return (
                new_maximum,
                denominator * correction + _fold(jnp.add, weights),
                accumulator * correction + block_output,
            )

        start = (
            jnp.full((*row_shape, 1), MASKED, jnp.float32),
            jnp.zeros((*row_shape, 1), jnp.float32),
            jnp.zeros((*row_shape, head_dim), jnp.float32),
        )
        _, denominator, accumulator = jax.lax.fori_loop(
            first_blocks[tile], num_blocks[tile], attend_block, start
        )
        # A padding tile between real ones has met no block: 0 / 1.
        tile_outputs = accumulator / jnp.where(denominator == 0, 1, denominator)
        return jax.lax.dynamic_update_index_in_dim(outputs, tile_outputs, tile, 0)

    num_real = jnp.max(jnp.where(is_real, jnp.arange(num_tiles, dtype=jnp.int32) + 1, 0))
    outputs = jax.lax.fori_loop(
        0, num_real, attend_tile, jnp.zeros((num_tiles, *row_shape, head_dim), jnp.float32)
    )
    outputs = outputs[:, :, :num_rows]
    outputs = outputs.reshape(num_tiles, num_kv_heads, group, tiles.rows, head_dim)
    return outputs.transpose(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)


def _fold(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """[..., K] -> [..., 1], always in the same order: halves are combined until one is left.

    XLA:CPU vectorizes this, and not the maximum of a row (81 against 6 us for [3, 192, 128]).
    """
    while (size := x.shape[-1]) > 1:
        half = size // 2
        halves = combine(x[..., :half], x[..., half : 2 * half])
        rest = x[..., 2 * half :]  # one column where the size is odd
        x = halves if size % 2 == 0 else jnp.concatenate([halves, rest], axis=-1)
    return x
