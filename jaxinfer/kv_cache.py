"""The paged KV cache on the device, layer by layer, and what a page costs."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.config import MAX_PAGES, ModelConfig
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.sharding import named_sharding, num_tensor_devices, physical_model
from pallas_kernels import ragged_paged_attention as attention_kernels
from pallas_kernels.ragged_paged_attention import KVPages

# Names for people -> how pages hold it; the others are dtypes themselves.
_STORED = {"fp8": "uint8"}

# Logical axes of all arrays of a layer's pages: every device has all pages of its heads.
KV_PAGES_AXES = (None, "kv_heads")


def page_bytes(
    model: ModelConfig, page_size: int, dtype: str, mesh: Mesh, attention: str | None = None
) -> int:
    """Bytes of one page over all layers and devices, in the form of the attention's backend.

    Keys and values, copies of kv heads and what fills up lanes too.
    """
    return num_bytes(abstract_kv_pages(model, 1, page_size, dtype, mesh, attention))


def abstract_kv_pages(
    model: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: str,
    mesh: Mesh,
    attention: str | None = None,
) -> tuple[KVPages, ...]:
    """Shapes and shardings of every layer's pages, split over kv heads.

    ``dtype`` is that of ``DtypePolicy.kv_cache``: int8 and fp8 (e4m3) pages have scales.
    ``attention``: name of a backend, instead of the first that takes these sizes on ``mesh``.
    """
    physical = physical_model(model, num_tensor_devices(mesh))
    device = mesh.devices.flat[0]
    layer = attention_kernels.abstract_kv_pages(
        device.platform,
        num_pages,
        page_size,
        physical.num_key_value_heads,
        model.head_dim,
        jnp.dtype(_STORED.get(dtype, dtype)),
        device_kind=device.device_kind,
        backend=attention,
    )
    sharding = named_sharding(mesh, KV_PAGES_AXES)
    layer = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), layer
    )
    return (layer,) * model.num_hidden_layers


def abstract_drafter_pages(spec: EngineSpec, num_pages: int) -> tuple[KVPages, ...]:
    """Returns shapes and shardings of the pages that the drafter has of its own, () for none."""
    if spec.draft is None or not spec.config.drafter.has_pages:
        return ()
    model, dtype = spec.draft.model, spec.draft.dtypes.kv_cache
    page_size, attention = spec.config.page_size, spec.config.attention
    return abstract_kv_pages(model, num_pages, page_size, dtype, spec.mesh, attention)


def bytes_per_page(spec: EngineSpec) -> int:
    """Returns the bytes of one page over all layers and devices, the drafter's part too."""
    config, dtype = spec.config, spec.dtypes.kv_cache
    target = page_bytes(spec.model, config.page_size, dtype, spec.mesh, config.attention)
    return target + num_bytes(abstract_drafter_pages(spec, 1))


def plan_num_pages(spec: EngineSpec, memory_bytes: int) -> int:
    """Pages that fit ``memory_bytes``; without a prefix cache no more than all slots could use.

    ``memory_bytes`` is that of all devices together, of which each has its share. How many pages
    ``spec`` has is not looked at.
    """
    config = spec.config
    fitting = memory_bytes // bytes_per_page(spec)
    return min(fitting, MAX_PAGES if config.prefix_cache else config.max_pages_of_slots)


def num_bytes(pages: tuple[KVPages, ...]) -> int:
    """Returns the bytes of pages over all devices."""
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(pages))
