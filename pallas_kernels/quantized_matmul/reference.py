"""The definition: dequantize, then multiply in float32. Never the fast path."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.nibbles import unpack_nibbles

# It runs anywhere.
PLATFORMS: frozenset[str] | None = None


def int8_matmul(
    inputs: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activation_bits: int,
    activation_group: int | None = None,
) -> jax.Array:
    """See ``pallas_kernels.quantized_matmul``."""
    x = inputs.astype(jnp.float32)
    num_inputs = x.ndim - 1
    if activation_bits == 8:
        groups = x.reshape(x.shape[0], -1, activation_group or x[0].size)
        scale = jnp.max(jnp.abs(groups), axis=2, keepdims=True) / 127
        x = (jnp.round(groups / jnp.where(scale == 0, 1, scale)) * scale).reshape(x.shape)
    weights = values * jnp.expand_dims(scales, tuple(range(scales.ndim, values.ndim)))
    axes = tuple(range(1, x.ndim)), tuple(range(values.ndim - num_inputs, values.ndim))
    return jnp.tensordot(x, weights, axes, precision=jax.lax.Precision.HIGHEST)


def float8_matmul(inputs: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """See ``pallas_kernels.quantized_matmul``."""
    rows, row_scales = float8_rows(inputs)
    weights = values.astype(jnp.float32) * scales[..., None]
    x = rows.astype(jnp.float32) * row_scales
    axes = (1,), (values.ndim - 1,)
    return jnp.tensordot(x, weights, axes, precision=jax.lax.Precision.HIGHEST)


def float8_rows(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float8_e4m3fn [T, I] and float32 [T, 1]: rows, and what one stands for in each."""
    x = inputs.astype(jnp.float32)
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / largest
    return (x / jnp.where(scale == 0, 1, scale)).astype(jnp.float8_e4m3fn), scale


def grouped_matmul(
    inputs: jax.Array, values: jax.Array, scales: jax.Array, minimums: jax.Array | None
) -> jax.Array:
    """See ``pallas_kernels.quantized_matmul``."""
    matrix = dequantized(values, scales, minimums, axis=0)
    x = inputs.astype(jnp.float32)
    return jnp.tensordot(x, matrix, 1, precision=jax.lax.Precision.HIGHEST)


def dequantized(
    values: jax.Array, scales: jax.Array, minimums: jax.Array | None, *, axis: int
) -> jax.Array:
    """The matrix of ``grouped_matmul`` in float32, with its inputs at ``axis``."""
    is_packed = values.dtype == jnp.uint8
    group = values.shape[axis] * (2 if is_packed else 1) // scales.shape[axis]
    integers = unpack_nibbles(values, group, axis) if is_packed else values
    before, after = integers.shape[:axis], integers.shape[axis + 1 :]
    numbers = integers.reshape(*before, -1, group, *after).astype(jnp.float32)
    if minimums is None:
        numbers = (numbers - 8 if is_packed else numbers) * _of_groups(scales, axis)
    else:
        numbers = numbers * _of_groups(scales, axis) + _of_groups(minimums, axis)
    return numbers.reshape(integers.shape)


def _of_groups(array: jax.Array, axis: int) -> jax.Array:
    return jnp.expand_dims(array.astype(jnp.float32), axis + 1)
