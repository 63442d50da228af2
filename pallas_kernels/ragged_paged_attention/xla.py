"""Blocked attention in plain XLA: query tiles against KV blocks with a running softmax.

Runs anywhere. Four rules make a row's bits independent of its neighbours on XLA:CPU; two of them
are kept here (the other two, at least 8 rows and a compiler option, by the step):
KV blocks have a fixed number of tokens and a dynamic trip count, so a row meets the same blocks
whatever else is in the batch; and the softmax denominator is a dot with ones, since a reduction is
vectorized differently for different row counts.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.tiles import QueryTiles, RaggedBatch

KV_BLOCK_TOKENS = 128
MASKED = -1e30  # finite: (-inf) - (-inf) would be NaN in a row that has seen no key yet


def ragged_paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_pages: jax.Array,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    logit_soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022); see the package."""
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
    kv_pages: jax.Array, keys: jax.Array, values: jax.Array, batch: RaggedBatch
) -> jax.Array:
    """Scatters the new rows [T, G, D] to their pages; in place when ``kv_pages`` is donated."""
    num_pages, _, _, page_size, _ = kv_pages.shape
    positions, is_real = batch.positions(), batch.is_real()
    page_indices = jnp.minimum(positions // page_size, batch.page_table.shape[1] - 1)
    pages = batch.page_table[batch.sequences(), page_indices]
    pages = jnp.where(is_real, pages, num_pages)  # out of bounds: dropped
    new = jnp.stack([keys, values], axis=2).astype(kv_pages.dtype)  # [T, G, 2, D]
    return kv_pages.at[pages, :, :, positions % page_size].set(new, mode="drop")


def _attend(
    queries: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    tiles: QueryTiles,
    scale: float,
    sliding_window: int | None,
    logit_soft_cap: float | None,
) -> jax.Array:
    """[N * rows, H, D] queries of equal tiles -> outputs of that shape, float32."""
    _, num_heads, head_dim = queries.shape
    num_kv_heads, page_size = kv_pages.shape[1], kv_pages.shape[3]
    group = num_heads // num_kv_heads
    num_tiles = tiles.starts.shape[0]
    # [N, G, group * rows, D]: the query heads of a kv head share its keys as more rows.
    grouped = queries.reshape(num_tiles, tiles.rows, num_kv_heads, group, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(num_tiles, num_kv_heads, -1, head_dim)
    grouped = grouped * jnp.asarray(scale, grouped.dtype)
    query_positions = jnp.tile(tiles.positions(), (1, group))  # [N, group * rows]

    pages_per_block = max(1, KV_BLOCK_TOKENS // page_size)
    block_tokens = pages_per_block * page_size
    missing = -page_table.shape[1] % pages_per_block  # dynamic_slice would clamp, not pad
    tables = jnp.pad(page_table, ((0, 0), (0, missing)))[tiles.sequences]  # [N, P]
    last_positions = jnp.where(tiles.lens > 0, tiles.starts + tiles.lens - 1, 0)
    num_blocks = jnp.max(last_positions) // block_tokens + 1
    ones = jnp.ones((block_tokens, 1), jnp.float32)

    def block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum, denominator, accumulator = carry
        pages = jax.lax.dynamic_slice_in_dim(tables, index * pages_per_block, pages_per_block, 1)
        gathered = kv_pages[pages].transpose(0, 2, 3, 1, 4, 5)  # [N, G, 2, pages, page_size, D]
        gathered = gathered.reshape(num_tiles, num_kv_heads, 2, block_tokens, head_dim)
        scores = jnp.einsum(
            "ngmd,ngkd->ngmk", grouped, gathered[:, :, 0], preferred_element_type=jnp.float32
        )
        if logit_soft_cap is not None:
            scores = logit_soft_cap * jnp.tanh(scores / logit_soft_cap)
        key_positions = index * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)
        visible = key_positions[None, None, :] <= query_positions[:, :, None]
        if sliding_window is not None:
            visible &= key_positions[None, None, :] > query_positions[:, :, None] - sliding_window
        scores = jnp.where(visible[:, None], scores, MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_maximum)
        correction = jnp.exp(maximum - new_maximum)
        block_sum = jnp.einsum("ngmk,ko->ngmo", weights, ones)
        block_output = jnp.einsum(
            "ngmk,ngkd->ngmd",
            weights.astype(gathered.dtype),
            gathered[:, :, 1],
            preferred_element_type=jnp.float32,
        )
        return (
            new_maximum,
            denominator * correction + block_sum,
            accumulator * correction + block_output,
        )

    row_shape = grouped.shape[:-1]
    start = (
        jnp.full((*row_shape, 1), MASKED, jnp.float32),
        jnp.zeros((*row_shape, 1), jnp.float32),
        jnp.zeros((*row_shape, head_dim), jnp.float32),
    )
    _, denominator, accumulator = jax.lax.fori_loop(0, num_blocks, block, start)
    outputs = accumulator / denominator
    outputs = outputs.reshape(num_tiles, num_kv_heads, group, tiles.rows, head_dim)
    return outputs.transpose(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)
