"""Attention of ragged query tiles over a paged KV cache, the write of new keys and values included.

One call serves decodes, prompt chunks and draft verification: they differ only in how many query
rows a tile has. Axis letters: T query rows, N tiles, S sequences, P pages per sequence, H query
heads, G kv heads, D head dim.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.ragged_paged_attention import reference, xla
from pallas_kernels.ragged_paged_attention.tiles import KVPages, QueryTiles, RaggedBatch

__all__ = ["IMPLEMENTATIONS", "KVPages", "QueryTiles", "RaggedBatch", "kv_pages_shapes"]
__all__ += ["ragged_paged_attention"]

# The first that does not decline is taken; `reference` is the definition, never the fast path.
IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    "xla": xla.ragged_paged_attention,
    "reference": reference.ragged_paged_attention,
}


def kv_pages_shapes(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of one layer's key pages [pages, G, D, page_size] and value pages [.., page_size, D].

    Kv heads come before tokens, so that a gathered block is one matrix a head, and keys lie
    transposed, as the product with queries wants them: see docs/log.md for what else was measured.
    """
    return (
        (num_pages, num_kv_heads, head_dim, page_size),
        (num_pages, num_kv_heads, page_size, head_dim),
    )


def ragged_paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_pages: KVPages,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, KVPages]:
    """Writes new keys and values to their pages, then attends causally over each row's sequence.

    ``queries`` [T, H, D], ``keys`` and ``values`` [T, G, D], ``kv_pages`` as ``kv_pages_shapes``.
    With ``sliding_window`` w the row at position i sees positions i-w+1 .. i; ``logit_soft_cap`` c
    replaces a score x by c tanh(x / c). ``backend`` names one of ``IMPLEMENTATIONS``.
    Returns (outputs [T, H, D], kv_pages); donate ``kv_pages`` or they are copied.
    Raises ``ValueError`` for shapes that do not fit together.
    """
    rows, num_heads, head_dim = queries.shape
    shapes = tuple(pages.shape for pages in kv_pages)
    num_pages, num_kv_heads, page_size, _ = shapes[1]
    if shapes != kv_pages_shapes(num_pages, page_size, num_kv_heads, head_dim):
        raise ValueError(f"kv_pages {shapes} do not hold head_dim {head_dim}")
    if keys.shape != (rows, num_kv_heads, head_dim) or values.shape != keys.shape:
        raise ValueError(
            f"keys {keys.shape} and values {values.shape} must be "
            f"{(rows, num_kv_heads, head_dim)} for queries {queries.shape}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} kv heads")
    if batch.num_rows != rows:
        raise ValueError(f"the batch describes {batch.num_rows} rows, queries have {rows}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    return dispatch(
        "ragged_paged_attention",
        IMPLEMENTATIONS,
        backend,
        queries,
        keys,
        values,
        kv_pages,
        batch,
        scale=scale,
        sliding_window=sliding_window,
        logit_soft_cap=logit_soft_cap,
    )
