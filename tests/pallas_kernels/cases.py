"""The one list of named cases that every attention backend must pass, and how to build one."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import IMPLEMENTATIONS, KVPages, QueryTiles, RaggedBatch


@dataclass(frozen=True)
class AttentionCase:
    """Sequences by (tokens already in the pages, new tokens); decodes bring ``decode_rows``.

    ``decodes`` are lengths before their new rows; ``chunks`` are (start, number of tokens).
    """

    name: str
    decodes: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    decode_rows: int = 1
    tile_rows: int = 16
    padding_decodes: int = 0
    padding_tiles: int = 0
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 16
    page_size: int = 16
    sliding_window: int | None = None
    logit_soft_cap: float | None = None


CASES = (
    AttentionCase("one_decode_first_token", decodes=(0,)),
    AttentionCase("one_decode", decodes=(37,)),
    AttentionCase("page_border_minus_one", decodes=(14, 30)),
    AttentionCase("page_border", decodes=(15, 31)),
    AttentionCase("page_border_plus_one", decodes=(16, 32)),
    AttentionCase("block_border", decodes=(126, 127, 128, 129)),
    AttentionCase("one_chunk", chunks=((0, 16),)),
    AttentionCase("one_token_chunk", chunks=((0, 1),)),
    AttentionCase("ragged_chunk", chunks=((0, 41),)),
    AttentionCase("later_chunk", chunks=((32, 20),)),
    AttentionCase("chunk_across_blocks", chunks=((100, 60),)),
    AttentionCase("unaligned_chunk", chunks=((7, 30),)),
    AttentionCase("two_chunks", chunks=((0, 17), (48, 33))),
    AttentionCase("mixed", decodes=(5, 63, 140), chunks=((0, 23), (16, 16))),
    AttentionCase("padding", decodes=(9,), chunks=((0, 5),), padding_decodes=3, padding_tiles=2),
    AttentionCase("padding_only", padding_decodes=8, padding_tiles=1),
    AttentionCase("full_last_page", decodes=(47,), chunks=((0, 48),)),
    AttentionCase("verify_rows", decodes=(13, 30, 126), decode_rows=5),
    AttentionCase("verify_mixed", decodes=(13,), decode_rows=4, chunks=((0, 20),)),
    AttentionCase("heads_12_2", decodes=(20,), chunks=((0, 20),), num_heads=12, num_kv_heads=2),
    AttentionCase("heads_14_2", decodes=(20,), chunks=((0, 20),), num_heads=14, num_kv_heads=2),
    AttentionCase("heads_32_8", decodes=(20,), chunks=((0, 20),), num_heads=32, num_kv_heads=8),
    AttentionCase("heads_4_1", decodes=(20,), chunks=((0, 20),), num_heads=4, num_kv_heads=1),
    AttentionCase("heads_4_4", decodes=(20,), chunks=((0, 20),), num_heads=4, num_kv_heads=4),
    AttentionCase("head_dim_64", decodes=(70,), chunks=((0, 70),), head_dim=64),
    AttentionCase("head_dim_80", decodes=(20,), chunks=((0, 20),), head_dim=80),
    AttentionCase("head_dim_96", decodes=(20,), chunks=((0, 20),), head_dim=96),
    AttentionCase("head_dim_128", decodes=(20,), chunks=((0, 20),), head_dim=128),
    AttentionCase("wide_heads_4_2", (20,), ((0, 20),), num_heads=4, num_kv_heads=2, head_dim=128),
    AttentionCase("head_dim_256", decodes=(20,), chunks=((0, 20),), head_dim=256),
    AttentionCase("gemma3", (50,), ((0, 40),), 1, 16, 0, 0, 4, 1, 256, sliding_window=20),
    AttentionCase("gemma3_two_kv_heads", (20,), ((0, 20),), 1, 16, 0, 0, 4, 2, 256),
    AttentionCase("qwen3_moe", (20,), ((0, 20),), num_heads=32, num_kv_heads=4, head_dim=128),
    AttentionCase("phi3", (20,), ((0, 20),), num_heads=4, num_kv_heads=4, head_dim=96),
    AttentionCase("phi4_mini", (20,), ((0, 20),), num_heads=24, num_kv_heads=8, head_dim=128),
    AttentionCase("window_below_page", decodes=(50,), chunks=((0, 40),), sliding_window=5),
    AttentionCase("window_one", decodes=(50,), chunks=((16, 20),), sliding_window=1),
    AttentionCase("window_across_blocks", decodes=(200,), chunks=((120, 30),), sliding_window=100),
    AttentionCase("window_longer_than_all", decodes=(50,), sliding_window=1000),
    AttentionCase("soft_cap", decodes=(50,), chunks=((0, 40),), logit_soft_cap=2.0),
    AttentionCase("soft_cap_and_window", chunks=((0, 40),), logit_soft_cap=3.0, sliding_window=9),
    AttentionCase("page_of_one_token", decodes=(6,), chunks=((3, 9),), page_size=1),
    AttentionCase("page_of_block", decodes=(130,), chunks=((0, 140),), page_size=128),
    AttentionCase("page_beyond_block", decodes=(130,), chunks=((0, 140),), page_size=256),
)


@dataclass(frozen=True)
class AttentionInputs:
    """Arrays of a case, and for every real row its sequence, position and row index.

    Pages are logical: [pages, G, page_size, D].
    """

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    key_pages: np.ndarray
    value_pages: np.ndarray
    batch: RaggedBatch
    rows: tuple[tuple[int, int, int], ...]

    def arrays(
        self, backend: str, dtype: Any = jnp.float32, **form: Any
    ) -> tuple[Any, Any, Any, KVPages]:
        """Queries, keys, values and pages, as the backend takes them. ``form`` of its pages."""
        queries, keys, values, key_pages, value_pages = (
            jnp.asarray(array, dtype)
            for array in (self.queries, self.keys, self.values, self.key_pages, self.value_pages)
        )
        pages = IMPLEMENTATIONS[backend].from_logical(key_pages, value_pages, **form)
        return queries, keys, values, pages


def build(case: AttentionCase, seed: int = 0) -> AttentionInputs:
    """Random arrays for ``case``; pages are permuted, so that no id is drafted right."""
    random = np.random.RandomState(seed)
    lengths = [length + case.decode_rows for length in case.decodes]
    lengths += [start + count for start, count in case.chunks]
    num_sequences = max(1, len(lengths))
    width = max([1, *(-(-length // case.page_size) for length in lengths)])
    num_pages = num_sequences * width + 3
    page_table = random.permutation(num_pages)[: num_sequences * width]
    page_table = page_table.reshape(num_sequences, width).astype(np.int32)

    padding = ((0, 0, 0),)  # sequence, start, rows
    decodes = [(index, length, case.decode_rows) for index, length in enumerate(case.decodes)]
    decodes += padding * case.padding_decodes
    tiles = []
    for index, (start, count) in enumerate(case.chunks, start=len(case.decodes)):
        tiles += [
            (index, start + first, min(case.tile_rows, count - first))
            for first in range(0, count, case.tile_rows)
        ]
    tiles += padding * case.padding_tiles

    rows, row = [], 0
    for group, height in ((decodes, case.decode_rows), (tiles, case.tile_rows)):
        for sequence, start, real in group:
            rows += [(sequence, start + offset, row + offset) for offset in range(real)]
            row += height

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    pages = (num_pages, case.num_kv_heads, case.page_size, case.head_dim)
    return AttentionInputs(
        queries=normal(row, case.num_heads, case.head_dim),
        keys=normal(row, case.num_kv_heads, case.head_dim),
        values=normal(row, case.num_kv_heads, case.head_dim),
        key_pages=normal(*pages),
        value_pages=normal(*pages),
        batch=RaggedBatch(
            page_table=jnp.asarray(page_table),
            decodes=_tiles(decodes, case.decode_rows),
            chunks=_tiles(tiles, case.tile_rows),
        ),
        rows=tuple(rows),
    )


def _tiles(group: list[tuple[int, int, int]], rows: int) -> QueryTiles:
    columns = np.asarray(group, np.int32).reshape(-1, 3).T
    return QueryTiles(
        sequences=jnp.asarray(columns[0]),
        starts=jnp.asarray(columns[1]),
        lens=jnp.asarray(columns[2]),
        rows=rows,
    )


# One of each kind, for runs of minutes: the others are thorough.
FEW = (
    "ragged_chunk",
    "mixed",
    "verify_mixed",
    "head_dim_80",
    "gemma3_two_kv_heads",
    "soft_cap_and_window",
    "page_beyond_block",
)
SUBJECT = "more cases of the kernels"
