"""The physical form of pages on TPU: head by head a [page_size, lanes] matrix, one DMA a page.

Axis letters: T rows, N tiles, G kv heads, H query heads, D head dim, J matrices a page.

Up to a head dim of 64 a token's key and value lie side by side in the 128 lanes of a row (J = G):
queries padded with zeros meet only the keys, and the product of the weights with such rows has
the output in its upper half. Wider heads have a key matrix and a value matrix each (J = 2G, key
and value of a head adjacent, so that an even split of J is a split of kv heads), lanes padded to a
multiple of 128.

Pages of one byte a value have a float32 scale for every token's key and value in every head, see
quantized_rows.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.quantized_rows import (
    dequantize_rows,
    is_quantized,
    quantize_rows,
)
from pallas_kernels.tpu_registers import NUM_LANES

SIDE_BY_SIDE = NUM_LANES // 2  # the widest head whose key and value share a row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedKVPages:
    """A layer's ``pages`` [pages, J, page_size, lanes] and ``scales`` [pages, 2G, page_size].

    ``scales`` of quantized pages only: key and value of a head adjacent. ``device_kind``: whose
    block sizes are taken, "" for the default ones.
    """

    pages: jax.Array
    scales: jax.Array | None = None
    device_kind: str = field(default="", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedRows:
    """Keys and values of T rows as pages hold them: [T, J, lanes], and ``scales`` [T, 2G]."""

    rows: jax.Array
    scales: jax.Array | None = None


def shares_row(head_dim: int) -> bool:
    """True where key and value of a token lie in one row of lanes."""
    return head_dim <= SIDE_BY_SIDE


def num_lanes(head_dim: int) -> int:
    """Lanes of a row: 128, or the head dim rounded up to a multiple of it."""
    return -(-head_dim // NUM_LANES) * NUM_LANES


def packed_shape(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int, int]:
    """[pages, J, page_size, lanes]."""
    rows = num_kv_heads if shares_row(head_dim) else 2 * num_kv_heads
    return num_pages, rows, page_size, num_lanes(head_dim)


def scales_shape(num_pages: int, page_size: int, num_kv_heads: int) -> tuple[int, int, int]:
    """[pages, 2G, page_size]."""
    return num_pages, 2 * num_kv_heads, page_size


def pack_rows(keys: jax.Array, values: jax.Array, dtype: jax.typing.DTypeLike) -> PackedRows:
    """Keys and values [T, G, D] as pages of ``dtype`` hold them."""
    rows, num_kv_heads, head_dim = keys.shape
    scales = None
    if is_quantized(dtype):
        keys, key_scales = quantize_rows(keys, dtype)
        values, value_scales = quantize_rows(values, dtype)
        scales = jnp.stack([key_scales, value_scales], axis=-1).reshape(rows, -1)
    keys, values = keys.astype(dtype), values.astype(dtype)
    if shares_row(head_dim):
        halves = [_pad(keys, SIDE_BY_SIDE), _pad(values, SIDE_BY_SIDE)]
        return PackedRows(jnp.concatenate(halves, axis=-1), scales)
    lanes = num_lanes(head_dim)
    both = jnp.stack([_pad(keys, lanes), _pad(values, lanes)], axis=2)
    return PackedRows(both.reshape(rows, 2 * num_kv_heads, lanes), scales)


def to_logical(kv_pages: PackedKVPages, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [pages, G, page_size, D] of all pages: for tests, it copies everything."""
    pages, scales = kv_pages.pages, kv_pages.scales
    if shares_row(head_dim):
        keys = pages[..., :head_dim]
        values = pages[..., SIDE_BY_SIDE : SIDE_BY_SIDE + head_dim]
    else:
        keys, values = pages[:, 0::2, :, :head_dim], pages[:, 1::2, :, :head_dim]
    if scales is None:
        return keys, values
    return dequantize_rows(keys, scales[:, 0::2]), dequantize_rows(values, scales[:, 1::2])


def from_logical(
    keys: jax.Array, values: jax.Array, dtype: jax.typing.DTypeLike | None = None
) -> PackedKVPages:
    """The inverse of ``to_logical``, in ``dtype`` or that of the keys."""
    num_pages, num_kv_heads, page_size, head_dim = keys.shape

    def to_rows(pages: jax.Array) -> jax.Array:
        return jnp.moveaxis(pages, 2, 1).reshape(-1, num_kv_heads, head_dim)

    packed = pack_rows(to_rows(keys), to_rows(values), keys.dtype if dtype is None else dtype)

    def to_pages(rows: jax.Array) -> jax.Array:
        return jnp.moveaxis(rows.reshape(num_pages, page_size, *rows.shape[1:]), 1, 2)

    return PackedKVPages(
        to_pages(packed.rows), None if packed.scales is None else to_pages(packed.scales)
    )


def pack_queries(queries: jax.Array, num_tiles: int, num_kv_heads: int, height: int) -> jax.Array:
    """[N * rows, H, D] -> [N, G, height, lanes]: the query heads of a kv head are more rows.

    Row r of head h of a group is row h * rows + r; what is missing to ``height`` is zeros.
    """
    _, num_heads, head_dim = queries.shape
    group = num_heads // num_kv_heads
    tiled = queries.reshape(num_tiles, -1, num_kv_heads, group, head_dim)
    tiled = tiled.transpose(0, 2, 3, 1, 4).reshape(num_tiles, num_kv_heads, -1, head_dim)
    missing = height - tiled.shape[2]
    return jnp.pad(tiled, ((0, 0), (0, 0), (0, missing), (0, num_lanes(head_dim) - head_dim)))


def unpack_outputs(outputs: jax.Array, rows: int, num_heads: int, head_dim: int) -> jax.Array:
    """[N, G, height, lanes] -> [N * rows, H, D]."""
    num_tiles, num_kv_heads, _, _ = outputs.shape
    group = num_heads // num_kv_heads
    first = SIDE_BY_SIDE if shares_row(head_dim) else 0
    outputs = outputs[:, :, : group * rows, first : first + head_dim]
    outputs = outputs.reshape(num_tiles, num_kv_heads, group, rows, head_dim)
    return outputs.transpose(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)


def _pad(array: jax.Array, size: int) -> jax.Array:
    return jnp.pad(array, ((0, 0), (0, 0), (0, size - array.shape[-1])))
