"""Ragged paged attention on TPU by a Mosaic kernel, the write of new keys and values included.

Decodes and chunks are a call each, of the same kernel with other block sizes. See tpu_kernel.py for
how it works and packed_pages.py for how its pages lie.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.packed_pages import (
    PackedKVPages,
    PackedRows,
    from_logical,
    pack_queries,
    pack_rows,
    packed_shape,
    scales_shape,
    shares_row,
    to_logical,
    unpack_outputs,
)
from pallas_kernels.ragged_paged_attention.quantized_rows import is_quantized
from pallas_kernels.ragged_paged_attention.tiles import QueryTiles, RaggedBatch, check_kv_pages
from pallas_kernels.ragged_paged_attention.tpu_kernel import attend_tile
from pallas_kernels.ragged_paged_attention.tpu_tile import Scratch, TileShape
from pallas_kernels.tpu_registers import NUM_LANES, SUBLANES
from pallas_kernels.tuning import tuned_sizes

# Where this backend runs.
PLATFORMS: frozenset[str] | None = frozenset({"tpu"})

__all__ = ["abstract_kv_pages", "from_logical", "ragged_paged_attention", "to_logical"]

MAX_SCALAR_BYTES = 768 * 1024  # of 1 MB of scalar memory, which the compiler uses too
VMEM_LIMIT_BYTES = 48 * 1024 * 1024  # of at least 64 MB of a core; what a kernel may take
MAX_BLOCKS_BYTES = 24 * 1024 * 1024  # of those, for the two buffers of keys and values
KV_BLOCK_TOKENS = 512


def ragged_paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_pages: PackedKVPages,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    logit_soft_cap: float | None,
    kv_block_tokens: int | None = None,
) -> tuple[jax.Array, PackedKVPages]:
    """Tiled attention (Dao et al. 2022) over pages (Kwon et al. 2023); see the package.

    ``kv_block_tokens``: a power of two, instead of what was tuned or the default.
    """
    _check(queries, keys, kv_pages, batch)
    dtype, page_size = kv_pages.pages.dtype, kv_pages.pages.shape[2]
    new = pack_rows(keys, values, dtype)
    outputs, row = [], 0
    sizes = block_sizes(kv_pages, queries.shape[1] // keys.shape[1], keys.shape[1])
    kinds = ("decode" if batch.decodes.rows == 1 else "verify", "chunk")
    for kind, tiles in zip(kinds, (batch.decodes, batch.chunks), strict=True):
        if tiles.num_rows:
            shape = TileShape(
                rows=tiles.rows,
                granule=_granule(dtype),
                page_size=page_size,
                pages_per_block=(kv_block_tokens or sizes[kind]) // page_size or 1,
                pages_per_sequence=batch.page_table.shape[1],
                num_kv_heads=keys.shape[1],
                shares_row=shares_row(queries.shape[-1]),
                scale=scale,
                sliding_window=sliding_window,
                logit_soft_cap=logit_soft_cap,
            )
            rows = slice(row, row + tiles.num_rows)
            tile_outputs, kv_pages = _attend(
                queries[rows],
                jax.tree.map(lambda array, rows=rows: array[rows], new),
                kv_pages,
                batch.page_table,
                tiles,
                shape,
            )
            outputs.append(tile_outputs)
        row += tiles.num_rows
    return jnp.concatenate(outputs), kv_pages


def abstract_kv_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    device_kind: str,
) -> PackedKVPages:
    """Shapes of a layer's pages, with scales where ``dtype`` has one byte."""
    dtype = jnp.dtype(dtype)
    has_scales = is_quantized(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16) and not has_scales:
        raise NotImplementedError(f"pages are {dtype}, not float32, bfloat16, int8 or uint8")
    granule = NUM_LANES if has_scales else _granule(dtype)
    if page_size % granule:
        raise NotImplementedError(
            f"a page of {page_size} tokens is no multiple of {granule}, for {dtype}"
        )
    shape = packed_shape(num_pages, page_size, num_kv_heads, head_dim)
    pages: Any = jax.ShapeDtypeStruct(shape, dtype)
    scales: Any = None
    if has_scales:
        shape = scales_shape(num_pages, page_size, num_kv_heads)
        scales = jax.ShapeDtypeStruct(shape, jnp.float32)
    return PackedKVPages(pages, scales, device_kind)


def block_sizes(kv_pages: PackedKVPages, group: int, num_kv_heads: int) -> dict[str, int]:
    """KV tokens of a block for tiles of "decode", "verify" and "chunk" rows, powers of two.

    Tuned ones where there are, else as many as the buffers hold, the same for all kinds: then a
    row's bits do not depend on the kind of tile it came in.
    """
    _, matrices, page_size, lanes = kv_pages.pages.shape
    token_bytes = matrices * lanes * kv_pages.pages.dtype.itemsize
    if 2 * page_size * token_bytes > MAX_BLOCKS_BYTES:
        raise NotImplementedError(
            f"two pages of {page_size} tokens take {2 * page_size * token_bytes} bytes of "
            f"{MAX_BLOCKS_BYTES} in vector memory: smaller pages or more devices"
        )
    default = KV_BLOCK_TOKENS
    while default > page_size and 2 * default * token_bytes > MAX_BLOCKS_BYTES:
        default //= 2
    bucket = bucket_name(num_kv_heads, group, lanes, page_size)
    dtype, kind = kv_pages.pages.dtype.name, kv_pages.device_kind
    tuned = tuned_sizes("ragged_paged_attention", kind, dtype, bucket) or {}
    return {name: tuned.get(name, default) for name in ("decode", "verify", "chunk")}


def bucket_name(num_kv_heads: int, group: int, lanes: int, page_size: int) -> str:
    """Under which name block sizes for a shape are kept."""
    return f"{num_kv_heads} kv heads of {group}, {lanes} lanes, pages of {page_size}"


def _granule(dtype: jnp.dtype) -> int:
    """Rows of values of ``dtype`` in one tile of memory: 8, 16 or 32 for 4, 2 or 1 bytes."""
    return SUBLANES * 4 // dtype.itemsize


def _check(
    queries: jax.Array, keys: jax.Array, kv_pages: PackedKVPages, batch: RaggedBatch
) -> None:
    """Raises ``NotImplementedError`` with the reason where the kernel is not made for this."""
    if not isinstance(kv_pages, PackedKVPages):
        raise NotImplementedError(f"pages are {type(kv_pages).__name__}")
    if queries.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"queries are {queries.dtype}, not float32 or bfloat16")
    num_pages, _, page_size, _ = kv_pages.pages.shape
    _, num_kv_heads, head_dim = keys.shape
    form = abstract_kv_pages(num_pages, page_size, num_kv_heads, head_dim, kv_pages.pages.dtype, "")
    check_kv_pages(kv_pages, form)
    tile_rows = max(batch.decodes.rows, batch.chunks.rows)
    if kv_pages.scales is not None and tile_rows > page_size:
        raise NotImplementedError(f"a tile of {tile_rows} rows is larger than a page, {page_size}")
    scalar_bytes = 4 * (
        batch.page_table.size + 3 * max(batch.decodes.starts.size, batch.chunks.starts.size)
    )
    if scalar_bytes > MAX_SCALAR_BYTES:
        raise NotImplementedError(
            f"a page table of {batch.page_table.shape} takes {scalar_bytes} bytes of "
            f"{MAX_SCALAR_BYTES} in scalar memory: larger pages make it smaller"
        )


def _attend(
    queries: jax.Array,
    new: PackedRows,
    kv_pages: PackedKVPages,
    page_table: jax.Array,
    tiles: QueryTiles,
    shape: TileShape,
) -> tuple[jax.Array, PackedKVPages]:
    """Queries [N * rows, H, D] and their new rows, of equal tiles -> outputs and pages."""
    num_tiles, num_kv_heads = tiles.starts.shape[0], shape.num_kv_heads
    _, num_heads, head_dim = queries.shape
    real_height = num_heads // num_kv_heads * shape.rows
    height = _round_up(real_height, _granule(queries.dtype))  # M
    packed = pack_queries(queries, num_tiles, num_kv_heads, height)
    offsets = np.arange(height, dtype=np.int32) % shape.rows
    offsets[real_height:] = 0

    def by_tile(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, *array.shape[1:]), lambda index, *_: (index, *[0] * (array.ndim - 1))
        )

    in_place = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), kv_pages)
    operands = (jnp.asarray(offsets)[:, None], packed, _by_tile(new, num_tiles, shape), kv_pages)
    scalars = (page_table.reshape(-1), tiles.sequences, tiles.starts, tiles.lens)
    first_page = len(jax.tree.leaves((scalars, operands[:-1])))
    outputs, kv_pages = pl.pallas_call(
        functools.partial(attend_tile, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_tiles,),
            in_specs=[
                pl.BlockSpec((height, 1), lambda *_: (0, 0)),
                by_tile(packed),
                jax.tree.map(by_tile, operands[2]),
                in_place,
            ],
            out_specs=[by_tile(packed), in_place],
            scratch_shapes=_scratch(kv_pages, height, shape),
        ),
        out_shape=[
            jax.ShapeDtypeStruct(packed.shape, queries.dtype),
            jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), kv_pages),
        ],
        input_output_aliases={
            first_page + index: 1 + index for index in range(len(jax.tree.leaves(kv_pages)))
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        name=f"ragged_paged_attention_{shape.rows}",
    )(*scalars, *operands)
    return unpack_outputs(outputs, shape.rows, num_heads, head_dim), kv_pages


def _by_tile(new: PackedRows, num_tiles: int, shape: TileShape) -> PackedRows:
    """[N * rows, J, lanes] -> [N, J, rows, lanes], more than one row in whole granules.

    Scales [N * rows, 2G] -> [N, 2G, page_size].
    """

    def to_tiles(rows: jax.Array, height: int) -> jax.Array:
        rows = rows.reshape(num_tiles, shape.rows, *rows.shape[1:])
        rows = jnp.moveaxis(rows, 1, 2)
        padding = [(0, 0)] * rows.ndim
        padding[2] = (0, height - shape.rows)
        return jnp.pad(rows, padding)

    height = 1 if shape.rows == 1 else _round_up(shape.rows, shape.granule)
    scales = None if new.scales is None else to_tiles(new.scales, shape.page_size)
    return PackedRows(to_tiles(new.rows, height), scales)


def _scratch(kv_pages: PackedKVPages, height: int, shape: TileShape) -> list[Any]:
    """Scratch memory of a kernel, as ``Scratch`` lists it."""
    pages, lanes = kv_pages.pages, kv_pages.pages.shape[-1]
    width = min(shape.block_tokens, NUM_LANES)
    running = pltpu.VMEM((shape.num_kv_heads, height, width), jnp.float32)

    def buffers(*leading: int) -> Any:
        return jax.tree.map(
            lambda array: pltpu.VMEM((*leading, *array.shape[1:]), array.dtype), kv_pages
        )

    written = buffers(2)
    new_rows: Any = pltpu.VMEM((pages.shape[1], shape.new_rows, lanes), pages.dtype)
    return list(
        Scratch(
            blocks=buffers(2, shape.pages_per_block),
            written=PackedKVPages(new_rows, written.scales, kv_pages.device_kind),
            maximum=running,
            denominator=running,
            accumulator=pltpu.VMEM((shape.num_kv_heads, height, lanes), jnp.float32),
            state=pltpu.SMEM((2,), jnp.int32),
            fetching=pltpu.SemaphoreType.DMA((2,)),
            writing=pltpu.SemaphoreType.DMA,
        )
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
