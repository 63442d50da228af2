"""Ragged rows as every backend is told of them: tiles of query rows, and the page table."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

# A layer's pages: a pytree of the backend that owns their form. The second axis of each array is kv
# heads, or what every head has the same number of.
KVPages = Any

# Score of a key that a query does not see. Finite: (-inf) - (-inf) would be NaN in a row that has
# seen no key yet.
MASKED = -1e30


def check_kv_pages(kv_pages: KVPages, expected: KVPages) -> None:
    """Raises ``ValueError`` where pages have not the shapes that ``expected`` has."""
    shapes, wanted = ([leaf.shape for leaf in jax.tree.leaves(x)] for x in (kv_pages, expected))
    if shapes != wanted:
        raise ValueError(f"kv_pages are {shapes}, for these keys they must be {wanted}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QueryTiles:
    """N tiles of ``rows`` query rows; a tile belongs to one sequence.

    ``sequences`` [N] int32: row of the page table. ``starts`` [N] int32: position in its sequence
    of a tile's first row. ``lens`` [N] int32: how many of its rows are real, the first ones; 0 for
    a padding tile. Padding rows write nothing, and their output is finite and means nothing.
    """

    sequences: jax.Array
    starts: jax.Array
    lens: jax.Array
    rows: int = field(metadata={"static": True})

    @property
    def num_rows(self) -> int:
        """Query rows of all tiles, padding included."""
        return self.starts.shape[0] * self.rows

    def positions(self) -> jax.Array:
        """[N, rows] int32: position of every row in its sequence, padding rows continuing."""
        return self.starts[:, None] + jnp.arange(self.rows, dtype=jnp.int32)[None, :]

    def is_real(self) -> jax.Array:
        """[N, rows] bool: which rows are not padding."""
        return jnp.arange(self.rows, dtype=jnp.int32)[None, :] < self.lens[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedBatch:
    """The rows of one step, decodes first: ``decodes`` (few rows a tile), then ``chunks``.

    ``page_table`` [S, P] int32: page ids of each sequence in order of position. Entries past a
    sequence's length are valid page ids of any content. Every row of a sequence that has rows here
    finds the keys of all earlier positions in the pages or among this batch's rows.
    """

    page_table: jax.Array
    decodes: QueryTiles
    chunks: QueryTiles

    @property
    def num_rows(self) -> int:
        """T: query rows of the step, padding included."""
        return self.decodes.num_rows + self.chunks.num_rows

    def positions(self) -> jax.Array:
        """[T] int32."""
        return jnp.concatenate(
            [self.decodes.positions().reshape(-1), self.chunks.positions().reshape(-1)]
        )

    def is_real(self) -> jax.Array:
        """[T] bool."""
        return jnp.concatenate(
            [self.decodes.is_real().reshape(-1), self.chunks.is_real().reshape(-1)]
        )

    def sequences(self) -> jax.Array:
        """[T] int32: row of the page table for every query row."""
        return jnp.concatenate(
            [jnp.repeat(tiles.sequences, tiles.rows) for tiles in (self.decodes, self.chunks)]
        )
