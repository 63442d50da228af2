"""The body of the TPU kernel: one grid step attends one query tile over its sequence's pages.

Pages stay in HBM and are fetched by hand, a block of a fixed number of tokens at a time, into one
of two buffers: while a block is worked on the next one is on its way, and during a tile's last
block the first one of the next tile. Blocks begin at multiples of their size, so a row meets the
same blocks whatever its neighbours are.

New rows are merged into the fetched block where attention wants them, and the touched granules
(the rows of tokens that one DMA can address) are written back from a buffer of their own.

Axis letters: G kv heads, J matrices a page, M query rows of a kv head, B tokens a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.packed_pages import PackedKVPages, PackedRows
from pallas_kernels.ragged_paged_attention.tiles import MASKED
from pallas_kernels.ragged_paged_attention.tpu_softmax import attend_rows
from pallas_kernels.ragged_paged_attention.tpu_tile import (
    IS_FETCHED,
    SLOT,
    Scalars,
    Scratch,
    Tile,
    TileShape,
)

ROWS_AT_ONCE = 256  # against a block: the scores of more rows spill more than they overlap
UNROLLED_PAGES = 8  # in a block; small pages are many, and would be much code
UNROLLED_ROWS = 64  # with at most so many a head, heads are unrolled and fill each other's waits


def attend_tile(
    page_table: Any,
    sequences: Any,
    starts: Any,
    lens: Any,
    row_offsets: Any,
    queries: Any,
    new: PackedRows,
    _: PackedKVPages,
    outputs: Any,
    kv_pages: PackedKVPages,
    *scratch_refs: Any,
    shape: TileShape,
) -> None:
    """Refs. ``row_offsets`` [M, 1] int32: row of the tile of every query row; ``queries`` and
    ``outputs`` [1, G, M, lanes]; ``new`` [1, J, rows, lanes] and scales [1, 2G, page_size];
    ``kv_pages`` in HBM, output and input at once.
    """
    scalars = Scalars(page_table, sequences, starts, lens)
    scratch = Scratch(*scratch_refs)
    state, index = scratch.state, pl.program_id(0)
    tile = Tile(index, scalars, shape)

    @pl.when(index == 0)
    def _begin() -> None:
        state[SLOT] = 0
        state[IS_FETCHED] = 0

    @pl.when(tile.num_rows == 0)
    def _padding() -> None:
        outputs[...] = jnp.zeros_like(outputs)

    @pl.when(tile.num_rows > 0)
    def _attend() -> None:
        first_slot = state[SLOT]

        @pl.when(state[IS_FETCHED] == 0)
        def _fetch_first() -> None:
            _fetch(tile, tile.first, first_slot, kv_pages, scratch, "start")

        state[IS_FETCHED] = 0
        scratch.maximum[...] = jnp.full_like(scratch.maximum, MASKED)
        scratch.denominator[...] = jnp.zeros_like(scratch.denominator)
        scratch.accumulator[...] = jnp.zeros_like(scratch.accumulator)
        _place_new_rows(tile, new, scratch.written)

        def attend_block(block: Any, carry: None) -> None:
            slot = (first_slot + block - tile.first) & 1

            @pl.when(block < tile.last)
            def _fetch_next() -> None:
                _fetch(tile, block + 1, 1 - slot, kv_pages, scratch, "start")

            @pl.when((block == tile.last) & (index + 1 < pl.num_programs(0)))
            def _fetch_next_tile() -> None:
                following = Tile(index + 1, scalars, shape)
                # Rows that this tile is still writing must not be fetched.
                is_written = (following.sequence != tile.sequence) | (
                    following.first < tile.start // shape.block_tokens
                )

                @pl.when((following.num_rows > 0) & is_written)
                def _fetch_it() -> None:
                    _fetch(following, following.first, 1 - slot, kv_pages, scratch, "start")
                    state[IS_FETCHED] = 1

            _fetch(tile, block, slot, kv_pages, scratch, "wait")
            fetched = jax.tree.map(lambda buffers: buffers.at[slot], scratch.blocks)
            _write_new_rows(tile, block, fetched, kv_pages, scratch)
            if kv_pages.scales is not None:
                _write_new_scales(tile, block, new, fetched, kv_pages, scratch)
            _clear_behind_end(tile, block, fetched)
            height = queries.shape[2]
            if height <= UNROLLED_ROWS:
                for head in range(shape.num_kv_heads):
                    rows = pl.ds(0, height)
                    attend_rows(tile, block, head, rows, row_offsets, queries, fetched, scratch)
                return carry

            def attend_head(head: Any, carry: None) -> None:
                for first in range(0, height, ROWS_AT_ONCE):
                    rows = pl.ds(first, min(ROWS_AT_ONCE, height - first))
                    attend_rows(tile, block, head, rows, row_offsets, queries, fetched, scratch)
                return carry

            return jax.lax.fori_loop(0, shape.num_kv_heads, attend_head, carry)

        jax.lax.fori_loop(tile.first, tile.last + 1, attend_block, None)
        state[SLOT] = (first_slot + tile.last - tile.first + 1) & 1
        for head in range(shape.num_kv_heads):
            total = jnp.sum(scratch.denominator[head], axis=1, keepdims=True)
            outputs[0, head] = (scratch.accumulator[head] / total).astype(outputs.dtype)
        _wait_for_writes(tile, kv_pages, scratch)


def _fetch(
    tile: Tile, block: Any, slot: Any, kv_pages: PackedKVPages, scratch: Scratch, action: str
) -> None:
    """Starts, or waits for, the copies of a block's pages that the sequence has."""

    def copy_page(place: Any) -> None:
        page = block * tile.shape.pages_per_block + place

        @pl.when(page < tile.num_pages)
        def _copy() -> None:
            page_id, semaphore = tile.page_id(page), scratch.fetching.at[slot]
            for pages, buffers in zip(
                jax.tree.leaves(kv_pages), jax.tree.leaves(scratch.blocks), strict=True
            ):
                target = buffers.at[slot, place]
                getattr(pltpu.make_async_copy(pages.at[page_id], target, semaphore), action)()

    _for_each_page(tile.shape, copy_page)


def _for_each_page(shape: TileShape, do: Callable[[Any], None]) -> None:
    """Calls ``do`` with the place of each page in a block; unrolled where they are few."""
    if shape.pages_per_block <= UNROLLED_PAGES:
        for place in range(shape.pages_per_block):
            do(place)
        return

    def body(place: Any, carry: None) -> None:
        do(place)
        return carry

    jax.lax.fori_loop(0, shape.pages_per_block, body, None)


def _place_new_rows(tile: Tile, new: PackedRows, written: PackedKVPages) -> None:
    """Moves the tile's new rows to where they lie in the granules from ``aligned_start`` on."""
    shape = tile.shape
    rows = new.rows[0]  # [J, rows, lanes]
    if shape.rows == 1:
        rows = jnp.broadcast_to(_wide(rows), written.pages.shape)  # later the right one is taken
        written.pages[...] = rows.astype(written.pages.dtype)
        return
    rows = _wide(rows)
    missing = shape.new_rows - rows.shape[1]
    rows = jnp.concatenate([rows, jnp.zeros_like(rows[:, :missing])], axis=1)
    moved = pltpu.roll(rows, tile.start - tile.aligned_start, 1)
    written.pages[...] = moved.astype(written.pages.dtype)


def _write_new_rows(
    tile: Tile, block: Any, fetched: PackedKVPages, kv_pages: PackedKVPages, scratch: Scratch
) -> None:
    """Merges the new rows into the fetched block and starts their way to the pages."""
    shape, written = tile.shape, scratch.written.pages
    granule, page_size = shape.granule, shape.page_size
    begin, end = block * shape.block_tokens, (block + 1) * shape.block_tokens
    first = jnp.maximum(begin - tile.aligned_start, 0) // granule
    after = jnp.minimum(jnp.maximum(end - tile.aligned_start, 0) // granule, tile.num_granules)

    def merge_granule(index: Any, carry: None) -> None:
        position = tile.aligned_start + index * granule
        page = position // page_size
        offset = pl.ds(pl.multiple_of(position % page_size, granule), granule)
        rows = pl.ds(pl.multiple_of(index * granule, granule), granule)
        place = page - block * shape.pages_per_block
        old, new = fetched.pages[place, :, offset, :], written[:, rows, :]
        merged = jnp.where(tile.is_new(position, old.shape, 1), _wide(new), _wide(old))
        merged = merged.astype(old.dtype)
        fetched.pages[place, :, offset, :] = merged
        written[:, rows, :] = merged
        target = kv_pages.pages.at[tile.page_id(page), :, offset, :]
        pltpu.make_async_copy(written.at[:, rows, :], target, scratch.writing).start()
        return carry

    jax.lax.fori_loop(first, after, merge_granule, None)


def _write_new_scales(
    tile: Tile,
    block: Any,
    new: PackedRows,
    fetched: PackedKVPages,
    kv_pages: PackedKVPages,
    scratch: Scratch,
) -> None:
    """The same for scales, whole pages of them: a page has positions in its lanes.

    A tile has no more rows than a page, so that rotated once its rows lie right in both pages that
    it may touch.
    """
    shape = tile.shape
    old_scales: Any = fetched.scales
    scale_pages: Any = kv_pages.scales
    written: Any = scratch.written.scales
    new_scales: Any = new.scales
    if shape.rows == 1:
        moved = jnp.broadcast_to(new_scales[0][:, :1], new_scales.shape[1:])
    else:
        moved = pltpu.roll(new_scales[0], tile.start % shape.page_size, 1)
    first_page = tile.start // shape.page_size
    for place in range(shape.pages_per_block):
        page = block * shape.pages_per_block + place

        @pl.when((page >= first_page) & (page < tile.num_pages))
        def _merge(place: int = place, page: Any = page) -> None:
            old = old_scales[place]
            merged = jnp.where(tile.is_new(page * shape.page_size, old.shape, 1), moved, old)
            old_scales[place] = merged
            source = written.at[page - first_page]
            source[...] = merged
            target = scale_pages.at[tile.page_id(page)]
            pltpu.make_async_copy(source, target, scratch.writing).start()


def _clear_behind_end(tile: Tile, block: Any, fetched: PackedKVPages) -> None:
    """Zeros for what a page's or buffer's earlier owner left behind the sequence's end.

    Weights of those keys are zero, but zero times what lies there may be NaN.
    """
    shape = tile.shape

    def clear_page(place: Any) -> None:
        begin = block * shape.block_tokens + place * shape.page_size

        @pl.when(tile.kv_len < begin + shape.page_size)
        def _clear() -> None:
            for matrix in range(fetched.pages.shape[1]):
                rows = fetched.pages[place, matrix]
                positions = begin + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
                kept = jnp.where(positions < tile.kv_len, _wide(rows), 0)
                fetched.pages[place, matrix] = kept.astype(rows.dtype)
            if fetched.scales is not None:
                scales = fetched.scales[place]
                positions = begin + jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1)
                fetched.scales[place] = jnp.where(positions < tile.kv_len, scales, 0)

    _for_each_page(shape, clear_page)


def _wait_for_writes(tile: Tile, kv_pages: PackedKVPages, scratch: Scratch) -> None:
    shape, written = tile.shape, scratch.written
    granule = pl.ds(0, shape.granule)
    rows = pltpu.make_async_copy(
        written.pages.at[:, granule, :], kv_pages.pages.at[0, :, granule, :], scratch.writing
    )

    def wait_for(copy: Any, count: Any) -> None:
        def wait(_: Any, carry: None) -> None:
            copy.wait()
            return carry

        jax.lax.fori_loop(0, count, wait, None)

    wait_for(rows, tile.num_granules)
    if kv_pages.scales is not None and written.scales is not None:
        page = pltpu.make_async_copy(written.scales.at[0], kv_pages.scales.at[0], scratch.writing)
        wait_for(page, tile.num_pages - tile.start // shape.page_size)


def _wide(array: jax.Array) -> jax.Array:
    """In 32 bits: selections and rotations of packed types are not to be had everywhere."""
    return array.astype(jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.int32)
