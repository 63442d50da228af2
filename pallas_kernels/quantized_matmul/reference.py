"""The definition: dequantize, then multiply in float32. Never the fast path."""

import jax
import jax.numpy as jnp


def int8_matmul(
    inputs: jax.Array, values: jax.Array, scales: jax.Array, *, activation_bits: int
) -> jax.Array:
    """See ``pallas_kernels.quantized_matmul``."""
    x = inputs.astype(jnp.float32)
    num_inputs = x.ndim - 1
    if activation_bits == 8:
        row_axes = tuple(range(1, x.ndim))
        scale = jnp.max(jnp.abs(x), axis=row_axes, keepdims=True) / 127
        x = jnp.round(x / jnp.where(scale == 0, 1, scale)) * scale
    weights = values * jnp.expand_dims(scales, tuple(range(scales.ndim, values.ndim)))
    axes = tuple(range(1, x.ndim)), tuple(range(values.ndim - num_inputs, values.ndim))
    return jnp.tensordot(x, weights, axes, precision=jax.lax.Precision.HIGHEST)
