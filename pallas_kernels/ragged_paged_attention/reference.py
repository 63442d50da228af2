"""The definition of ragged paged attention: every score of every row in float32, nothing clever."""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.tiles import KVPages, RaggedBatch


def ragged_paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_pages: KVPages,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    logit_soft_cap: float | None,
) -> tuple[jax.Array, KVPages]:
    """softmax(q k^T scale) v over each row's own sequence; see the package for the contract."""
    rows, num_heads, head_dim = queries.shape
    key_pages, value_pages = kv_pages
    num_pages, num_kv_heads, page_size, _ = value_pages.shape
    positions, is_real = batch.positions(), batch.is_real()
    tables = batch.page_table[batch.sequences()]  # [T, P]

    pages = tables[jnp.arange(rows), jnp.minimum(positions // page_size, tables.shape[1] - 1)]
    pages = jnp.where(is_real, pages, num_pages)  # out of bounds: dropped
    offsets = positions % page_size
    key_pages = key_pages.at[pages, :, :, offsets].set(keys.astype(key_pages.dtype), mode="drop")
    value_pages = value_pages.at[pages, :, offsets].set(
        values.astype(value_pages.dtype), mode="drop"
    )

    context_keys = key_pages[tables].astype(jnp.float32)  # [T, P, G, D, page_size]
    context_keys = context_keys.transpose(0, 2, 1, 4, 3).reshape(rows, num_kv_heads, -1, head_dim)
    context_values = value_pages[tables].astype(jnp.float32)  # [T, P, G, page_size, D]
    context_values = context_values.swapaxes(1, 2).reshape(context_keys.shape)
    grouped = queries.astype(jnp.float32).reshape(rows, num_kv_heads, -1, head_dim)
    scores = jnp.einsum("tgrd,tgkd->tgrk", grouped, context_keys, precision="highest") * scale
    if logit_soft_cap is not None:
        scores = logit_soft_cap * jnp.tanh(scores / logit_soft_cap)
    key_positions = jnp.arange(scores.shape[-1])[None, :]
    visible = key_positions <= positions[:, None]
    if sliding_window is not None:
        visible &= key_positions > positions[:, None] - sliding_window
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    outputs = jnp.einsum("tgrk,tgkd->tgrd", weights, context_values, precision="highest")
    outputs = jnp.where(is_real[:, None, None, None], outputs, 0)
    return outputs.reshape(rows, num_heads, head_dim).astype(queries.dtype), (
        key_pages,
        value_pages,
    )
