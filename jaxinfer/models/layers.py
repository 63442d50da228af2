"""Pieces every model family is made of. Axis letters: T rows, E embed, H heads, D head dim."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.config import ModelConfig
from jaxinfer.declaration import Declaration
from jaxinfer.kv_cache import KV_PAGES_AXES
from jaxinfer.sharding import named_sharding, num_tensor_devices, partition_spec
from jaxinfer.weights import Weight, matrix, product
from pallas_kernels.ragged_paged_attention import KVPages


def parameter(
    rngs: nnx.Rngs, declaration: Declaration, dtype: str, fan_in: int
) -> nnx.Param[jax.Array]:
    """Declares a parameter that stays as it is, initialised normal(fan_in^-1/2)."""
    initializer = jax.nn.initializers.normal(fan_in**-0.5)
    return declaration.parameter(initializer(rngs.params(), declaration.shape, jnp.dtype(dtype)))


def norm_scale(size: int, axis: str | None = "embed") -> nnx.Param[jax.Array]:
    """Declares the weight of an RMS norm, float32 on every platform; ``axis`` is what is normed."""
    return Declaration((size,), (axis,)).parameter(jnp.ones((size,), jnp.float32))


def traced_once(layer: nnx.Module, *inputs: Any) -> Any:
    """``layer(*inputs)``, traced and lowered once for all layers that differ only in weights.

    The compiler inlines the calls again: programs are the same, start-up is shorter.
    """
    graph, parameters = nnx.split(layer)
    return _apply(graph, nnx.to_pure_dict(parameters), *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef[Any], parameters: dict[Any, Any], *inputs: Any) -> Any:
    return nnx.merge(graph, parameters)(*inputs)


def split_over_kv_heads(attention: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """``attention(queries, keys, values, kv_pages, batch)``, on each device for its own kv heads.

    Rows are [T, heads, D], query heads in the order of their kv heads. The partitioner finds the
    same split of the plain XLA backend by itself; of a kernel it knows nothing and would gather
    all pages for it, so it is not asked.
    """
    if mesh is None or num_tensor_devices(mesh) == 1:
        return attention
    heads = partition_spec((None, "kv_heads", None))
    pages = partition_spec(KV_PAGES_AXES)

    def call(
        queries: jax.Array, keys: jax.Array, values: jax.Array, kv_pages: KVPages, batch: Any
    ) -> tuple[jax.Array, KVPages]:
        leaves, structure = jax.tree.flatten(batch)

        def attend(
            queries: jax.Array, keys: jax.Array, values: jax.Array, kv_pages: KVPages, *given: Any
        ) -> tuple[jax.Array, KVPages]:
            rest = iter(given)
            whole = [
                next(rest) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves
            ]
            return attention(queries, keys, values, kv_pages, structure.unflatten(whole))

        # XLA's partitioner crashes over an empty array given to a shard_map: a batch without
        # chunks has some.
        given = [leaf for leaf in leaves if leaf.size]
        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(heads, heads, heads, pages, *[PartitionSpec()] * len(given)),
            out_specs=(heads, pages),
            # Loops start from zeros, the same on every device; what they carry then is not.
            check_vma=False,
        )(queries, keys, values, kv_pages, *given)

    return call


def gathered(array: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """``array``, made in parts along its logical ``axes``, then whole on every device.

    Both must be said: of a product whose result is wanted whole, the partitioner may gather the
    weight instead, which is larger by far.
    """
    if mesh is None or num_tensor_devices(mesh) == 1:
        return array
    parts = jax.lax.with_sharding_constraint(array, named_sharding(mesh, axes))
    return jax.lax.with_sharding_constraint(parts, named_sharding(mesh))


def without_unused(logits: jax.Array, model: ModelConfig) -> jax.Array:
    """Returns ``logits`` [R, V], -inf for ids that no token has: nothing makes them likely."""
    if not model.unused_tokens:
        return logits
    is_unused = np.zeros(model.vocab_size, bool)
    for first, end in model.unused_tokens:
        is_unused[first:end] = True
    return jnp.where(is_unused[None, :], -jnp.inf, logits)


def rms_norm(inputs: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """[..., E] x / sqrt(mean(x^2) + epsilon) * scale, in float32 (Zhang and Sennrich 2019)."""
    x = inputs.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return (x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(inputs.dtype)


def linear(inputs: jax.Array, weight: Weight, bias: jax.Array | None = None) -> jax.Array:
    """[T, I...] times a matrix [I..., O...]: [T, O...] in the inputs' dtype.

    ``bias`` [O...]. Accumulates in float32.
    """
    products = product(inputs, matrix(weight))
    if bias is not None:
        products = products + bias[None].astype(jnp.float32)
    return products.astype(inputs.dtype)
