"""Attention of ragged query tiles over a paged KV cache, the write of new keys and values included.

One call serves decodes, prompt chunks and draft verification: they differ only in how many query
rows a tile has. Axis letters: T query rows, N tiles, S sequences, P pages per sequence, H query
heads, G kv heads, D head dim.

How pages lie in memory is each backend's own affair: ``abstract_kv_pages`` picks the backend by the
platform, and from then on the pages' type does.
"""

from collections.abc import Mapping
from typing import Any

import jax

from pallas_kernels.dispatch import dispatch, runs_on
from pallas_kernels.ragged_paged_attention import reference, tpu, xla
from pallas_kernels.ragged_paged_attention.tiles import KVPages, QueryTiles, RaggedBatch

__all__ = ["IMPLEMENTATIONS", "KVPages", "QueryTiles", "RaggedBatch"]
__all__ += ["abstract_kv_pages", "check_platform", "ragged_paged_attention"]

# The first that does not decline is taken; `reference` is the definition, never the fast path.
# A backend is a module with `PLATFORMS`, `abstract_kv_pages`, `from_logical`, `to_logical` and the
# operation.
IMPLEMENTATIONS: Mapping[str, Any] = {"tpu": tpu, "xla": xla, "reference": reference}


def abstract_kv_pages(
    platform: str,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    device_kind: str = "",
    backend: str | None = None,
) -> KVPages:
    """Shapes and dtypes of one layer's pages, of the first backend for ``platform`` to take them.

    ``backend`` names one of ``IMPLEMENTATIONS``, whatever the platform. ``device_kind``: whose
    tuned block sizes are taken. Raises ``ValueError`` for an unknown backend and
    ``NotImplementedError`` with every backend's reason when all decline.
    """

    def declines(name: str) -> None:
        raise NotImplementedError(f"runs on {_platforms(name)} only")

    makers = {
        name: module.abstract_kv_pages
        if name == backend or runs_on(module, platform)
        else lambda *_, name=name: declines(name)
        for name, module in IMPLEMENTATIONS.items()
    }
    shape = (num_pages, page_size, num_kv_heads, head_dim)
    return dispatch("KV pages", makers, backend, *shape, dtype, device_kind)


def check_platform(backend: str, platform: str, device_kind: str) -> None:
    """Raises ``ValueError`` where a backend of this name does not run on a platform."""
    if backend in IMPLEMENTATIONS and not runs_on(IMPLEMENTATIONS[backend], platform):
        raise ValueError(
            f"--attention {backend} runs on {_platforms(backend).upper()} only, "
            f"this is {device_kind}"
        )


def _platforms(backend: str) -> str:
    return " and ".join(sorted(IMPLEMENTATIONS[backend].PLATFORMS or ()))


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
) -> tuple[jax.Array, KVPages]:
    """Writes new keys and values to their pages, then attends causally over each row's sequence.

    ``queries`` [T, H, D], ``keys`` and ``values`` [T, G, D], ``kv_pages`` of the form that
    ``abstract_kv_pages`` gives: their backend runs. With ``sliding_window`` w the row at position i
    sees positions i-w+1 .. i; ``logit_soft_cap`` c replaces a score x by c tanh(x / c).
    Returns (outputs [T, H, D], kv_pages); donate ``kv_pages`` or they are copied.
    Raises ``ValueError`` for shapes that do not fit together.
    """
    rows, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
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
        {name: module.ragged_paged_attention for name, module in IMPLEMENTATIONS.items()},
        None,
        queries,
        keys,
        values,
        kv_pages,
        batch,
        scale=scale,
        sliding_window=sliding_window,
        logit_soft_cap=logit_soft_cap,
    )
