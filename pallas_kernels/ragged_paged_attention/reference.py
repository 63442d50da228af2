"""The definition of ragged paged attention: every score of every row in float32, nothing clever."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.quantized_rows import (
    dequantize_rows,
    is_quantized,
    quantize_rows,
)
from pallas_kernels.ragged_paged_attention.tiles import RaggedBatch, check_kv_pages

# It runs anywhere.
PLATFORMS: frozenset[str] | None = None


class LogicalKVPages(NamedTuple):
    """A layer's pages as one thinks of them: keys and values [pages, G, page_size, D].

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
) -> LogicalKVPages:
    """Shapes of a layer's pages."""
    pages: Any = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size, head_dim), dtype)
    if not is_quantized(dtype):
        return LogicalKVPages(pages, pages)
    scales: Any = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size), jnp.float32)
    return LogicalKVPages(pages, pages, scales, scales)


def from_logical(
    keys: jax.Array, values: jax.Array, dtype: jax.typing.DTypeLike | None = None
) -> LogicalKVPages:
    """Pages of this form; keys and values [pages, G, page_size, D]. ``dtype``: quantized to it."""
    if dtype is None or not is_quantized(dtype):
        return LogicalKVPages(keys, values)
    (keys, key_scales), (values, value_scales) = (quantize_rows(x, dtype) for x in (keys, values))
    return LogicalKVPages(keys, values, key_scales, value_scales)


def to_logical(kv_pages: LogicalKVPages, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of ``from_logical``."""
    if kv_pages.key_scales is None or kv_pages.value_scales is None:
        return kv_pages.keys, kv_pages.values
    return (
        dequantize_rows(kv_pages.keys, kv_pages.key_scales),
        dequantize_rows(kv_pages.values, kv_pages.value_scales),
    )


def ragged_paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_pages: LogicalKVPages,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    logit_soft_cap: float | None,
) -> tuple[jax.Array, LogicalKVPages]:
    """softmax(q k^T scale) v over each row's own sequence; see the package for the contract."""
    if not isinstance(kv_pages, LogicalKVPages):
        raise NotImplementedError(f"pages are {type(kv_pages).__name__}")
    num_pages, _, page_size, _ = kv_pages.keys.shape
    _, num_kv_heads, head_dim = keys.shape
    form = abstract_kv_pages(num_pages, page_size, num_kv_heads, head_dim, kv_pages.keys.dtype, "")
    check_kv_pages(kv_pages, form)
    rows, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    positions, is_real = batch.positions(), batch.is_real()
    tables = batch.page_table[batch.sequences()]  # [T, P]

    pages = tables[jnp.arange(rows), jnp.minimum(positions // page_size, tables.shape[1] - 1)]
    pages = jnp.where(is_real, pages, num_pages)  # out of bounds: dropped
    offsets = positions % page_size
    new = from_logical(keys, values, kv_pages.keys.dtype)  # [T, G, D], scales [T, G]
    kv_pages = jax.tree.map(
        lambda old, rows: old.at[pages, :, offsets].set(rows.astype(old.dtype), mode="drop"),
        kv_pages,
        new,
    )

    key_pages, value_pages = to_logical(kv_pages, head_dim)
    context_keys = key_pages[tables].astype(jnp.float32)  # [T, P, G, page_size, D]
    context_keys = context_keys.swapaxes(1, 2).reshape(rows, num_kv_heads, -1, head_dim)
    context_values = value_pages[tables].astype(jnp.float32)
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
    outputs = outputs.reshape(rows, num_heads, head_dim).astype(queries.dtype)
    return outputs, kv_pages
