"""The paged KV cache on the device, layer by layer, and what a page costs."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.config import ModelConfig
from jaxinfer.sharding import named_sharding, num_tensor_devices, physical_model
from pallas_kernels.ragged_paged_attention import KVPages, kv_pages_shapes

# EngineConfig refuses more.
MAX_PAGES = 1 << 24

# Logical axes of a layer's pages, keys and values alike: every device has all pages of its heads.
KV_PAGES_AXES = (None, "kv_heads", None, None)


def page_bytes(model: ModelConfig, page_size: int, dtype: str, num_devices: int = 1) -> int:
    """Bytes of one page over all layers and devices, keys and values, copies of kv heads too."""
    kv_heads = physical_model(model, num_devices).num_key_value_heads
    values = 2 * page_size * kv_heads * model.head_dim
    return values * model.num_hidden_layers * jnp.dtype(dtype).itemsize


def abstract_kv_pages(
    model: ModelConfig, num_pages: int, page_size: int, dtype: str, mesh: Mesh
) -> tuple[KVPages, ...]:
    """Shapes and shardings of every layer's pages, split over kv heads."""
    physical = physical_model(model, num_tensor_devices(mesh))
    shapes = kv_pages_shapes(num_pages, page_size, physical.num_key_value_heads, model.head_dim)
    sharding = named_sharding(mesh, KV_PAGES_AXES)
    keys, values = (
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape in shapes
    )
    return ((keys, values),) * model.num_hidden_layers  # type: ignore[return-value]


def plan_num_pages(
    model: ModelConfig,
    page_size: int,
    dtype: str,
    max_num_seqs: int,
    max_model_len: int,
    memory_bytes: int,
    num_devices: int = 1,
    prefix_cache: bool = False,
) -> int:
    """Pages that fit ``memory_bytes``; without a prefix cache no more than all slots could use.

    ``memory_bytes`` is that of all devices together, of which each has its share.
    """
    fitting = memory_bytes // page_bytes(model, page_size, dtype, num_devices)
    most = max_num_seqs * -(-max_model_len // page_size)
    return min(fitting, MAX_PAGES) if prefix_cache else min(fitting, most)
