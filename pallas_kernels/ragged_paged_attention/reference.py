"""The definition of ragged paged attention: every score of every row in float32, nothing clever."""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.tiles import RaggedBatch


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
    """softmax(q k^T scale) v over each row's own sequence; see the package for the contract."""
    rows, num_heads, head_dim = queries.shape
    num_pages, num_kv_heads, _, page_size, _ = kv_pages.shape
    positions, is_real = batch.positions(), batch.is_real()
    tables = batch.page_table[batch.sequences()]  # [T, P]

    pages = tables[jnp.arange(rows), jnp.minimum(positions // page_size, tables.shape[1] - 1)]
    pages = jnp.where(is_real, pages, num_pages)  # out of bounds: dropped
    new = jnp.stack([keys, values], axis=2).astype(kv_pages.dtype)  # [T, G, 2, D]
    kv_pages = kv_pages.at[pages, :, :, positions % page_size].set(new, mode="drop")

    context = kv_pages[tables]  # [T, P, G, 2, page_size, D]
    context = context.transpose(0, 2, 3, 1, 4, 5).reshape(rows, num_kv_heads, 2, -1, head_dim)
    context = context.astype(jnp.float32)
    grouped = queries.astype(jnp.float32).reshape(rows, num_kv_heads, -1, head_dim)
    scores = jnp.einsum("tgrd,tgkd->tgrk", grouped, context[:, :, 0], precision="highest") * scale
    if logit_soft_cap is not None:
        scores = logit_soft_cap * jnp.tanh(scores / logit_soft_cap)
    key_positions = jnp.arange(scores.shape[-1])[None, :]
    visible = key_positions <= positions[:, None]
    if sliding_window is not None:
        visible &= key_positions > positions[:, None] - sliding_window
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    outputs = jnp.einsum("tgrk,tgkd->tgrd", weights, context[:, :, 1], precision="highest")
    outputs = jnp.where(is_real[:, None, None, None], outputs, 0)
    return outputs.reshape(rows, num_heads, head_dim).astype(queries.dtype), kv_pages
