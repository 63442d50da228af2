"""The attention operation compiled for a TPU that is not there."""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.sharding import make_mesh, named_sharding
from jaxinfer_entrypoints.machine.tpu_targets import parse_target
from jaxinfer_entrypoints.machine.tpu_topology import topology_devices
from pallas_kernels.ragged_paged_attention import (
    QueryTiles,
    RaggedBatch,
    abstract_kv_pages,
    ragged_paged_attention,
)

NUM_PAGES = 1024
NUM_DECODES, NUM_TILES, CHUNK_ROWS = 64, 4, 128


def compile_attention(
    target: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: str = "bfloat16",
    *,
    dtype: str = "bfloat16",
    page_size: int = 128,
    decode_rows: int = 1,
    max_model_len: int = 8192,
    **options: Any,
) -> tuple[Any, Any]:
    """The compiled program of decodes and chunks on one chip, and its abstract pages."""
    mesh = make_mesh(topology_devices(parse_target(target))[:1])
    device, whole = mesh.devices.flat[0], named_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def tiles(count: int, rows: int) -> QueryTiles:
        return QueryTiles(*(array((count,), jnp.int32) for _ in range(3)), rows)  # type: ignore

    pages = abstract_kv_pages(
        device.platform,
        NUM_PAGES,
        page_size,
        num_kv_heads,
        head_dim,
        jnp.dtype(kv_dtype),
        device_kind=device.device_kind,
    )
    pages = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), pages)
    batch = RaggedBatch(
        array((NUM_DECODES, max_model_len // page_size), jnp.int32),
        tiles(NUM_DECODES, decode_rows),
        tiles(NUM_TILES, CHUNK_ROWS),
    )
    rows = batch.num_rows
    queries = array((rows, num_heads, head_dim), dtype)
    keys = array((rows, num_kv_heads, head_dim), dtype)
    operation = functools.partial(ragged_paged_attention, scale=head_dim**-0.5, **options)
    jitted = jax.jit(operation, donate_argnums=3)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jitted.trace(queries, keys, keys, pages, batch).lower()
    return lowered.compile(), pages


if __name__ == "__main__":
    compile_attention(*json.loads(sys.argv[1]))
