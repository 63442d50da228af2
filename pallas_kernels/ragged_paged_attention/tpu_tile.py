"""The TPU kernel's constants, what it keeps between grid steps, and a tile as scalars.

Axis letters: N tiles, S sequences, P pages per sequence, G kv heads, J matrices a page, M query
rows of a kv head, B tokens a block.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ragged_paged_attention.packed_pages import PackedKVPages

# What the scalars that outlive a grid step are.
SLOT, IS_FETCHED = 0, 1


@dataclass(frozen=True)
class TileShape:
    """Constants that a kernel is compiled for.

    ``rows`` query rows a tile, ``granule`` tokens that the smallest write covers, ``page_size`` and
    ``pages_per_block``, ``pages_per_sequence`` of the page table.
    """

    rows: int
    granule: int
    page_size: int
    pages_per_block: int
    pages_per_sequence: int
    num_kv_heads: int
    shares_row: bool
    scale: float
    sliding_window: int | None
    logit_soft_cap: float | None

    @property
    def block_tokens(self) -> int:
        """B."""
        return self.pages_per_block * self.page_size

    @property
    def new_rows(self) -> int:
        """Rows that the new keys and values of a tile may touch, in whole granules."""
        if self.rows == 1:
            return self.granule
        return -(-self.rows // self.granule) * self.granule + self.granule


class Scalars(NamedTuple):
    """Refs in scalar memory: ``page_table`` [S * P], the others [N]; see ``RaggedBatch``."""

    page_table: Any
    sequences: Any
    starts: Any
    lens: Any


class Scratch(NamedTuple):
    """Refs that outlive a grid step.

    ``blocks``: two buffers, [2, pages a block, J, page_size, lanes] and their scales
    [2, pages a block, 2G, page_size]. ``written``: what goes back to the pages, [J, new rows,
    lanes], and scales [2, 2G, page_size] of the two pages a tile may touch. ``maximum`` and
    ``denominator`` [G, M, at most 128] and ``accumulator`` [G, M, lanes]: the running softmax.
    ``state`` [2] scalars. A semaphore for each buffer, and one for what is written.
    """

    blocks: PackedKVPages
    written: PackedKVPages
    maximum: Any
    denominator: Any
    accumulator: Any
    state: Any
    fetching: Any
    writing: Any


class Tile:
    """One query tile as scalars: its sequence, where it starts and which blocks it meets."""

    def __init__(self, index: Any, scalars: Scalars, shape: TileShape) -> None:
        self.page_table, self.shape = scalars.page_table, shape
        self.sequence, self.start = scalars.sequences[index], scalars.starts[index]
        self.num_rows = scalars.lens[index]
        self.kv_len = self.start + self.num_rows
        self.num_pages = pl.cdiv(self.kv_len, shape.page_size)
        self.last = (self.kv_len - 1) // shape.block_tokens
        window = shape.sliding_window
        low = 0 if window is None else jnp.maximum(self.start - window + 1, 0)
        self.first = low // shape.block_tokens
        # New rows are written in granules from here on.
        self.aligned_start = self.start // shape.granule * shape.granule
        self.num_granules = pl.cdiv(self.kv_len - self.aligned_start, shape.granule)

    def page_id(self, index: Any) -> Any:
        """Id of the sequence's page number ``index``."""
        return self.page_table[self.sequence * self.shape.pages_per_sequence + index]

    def is_new(self, begin: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Marks this tile's positions, of an array whose ``axis`` counts from ``begin``."""
        positions = begin + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (positions >= self.start) & (positions < self.kv_len)
