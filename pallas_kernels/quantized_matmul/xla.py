"""Products with matrices of integers in plain XLA; runs anywhere.

XLA:CPU has a fast product of int8 with int8 and a slow one of int8 with anything else (ten times
the time of float32): activations are integers there, in two planes of 8 bits where they are to keep
16. Sums of integers are exact, so a row's bits depend on nothing but the row.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.reference import dequantized, float8_rows
from pallas_kernels.row_blocks import with_no_rows_left_over

# It runs anywhere.
PLATFORMS: frozenset[str] | None = None

# Two planes hold integers in [-127 * 128, 127 * 128]: high * 128 + low, low in [-64, 63].
_PLANE = 128
_MAX_LOW = 64
MAX_16_BIT = 127 * _PLANE


def int8_matmul(
    inputs: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activation_bits: int,
    activation_group: int | None = None,
) -> jax.Array:
    """See ``pallas_kernels.quantized_matmul``."""
    group = activation_group
    eight = _with_8_bits if group is None else functools.partial(_with_8_bit_groups, group=group)
    on_cpu, elsewhere = {8: (eight, eight), 16: (_with_two_planes, _with_floats)}[activation_bits]

    def flat(inputs: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
        # Matrices of more axes take three to eight times as long: they miss the fast kernels.
        rows = inputs.reshape(inputs.shape[0], -1)
        products = on_cpu(rows, values.reshape(-1, rows.shape[1]), scales.reshape(-1))
        return products.reshape(-1, *scales.shape)

    if group is not None:  # groups of a row, however many axes it has
        return flat(inputs, values, scales)
    return jax.lax.platform_dependent(inputs, values, scales, cpu=flat, default=elsewhere)


def grouped_matmul(
    inputs: jax.Array, values: jax.Array, scales: jax.Array, minimums: jax.Array | None
) -> jax.Array:
    """See ``pallas_kernels.quantized_matmul``.

    The matrix is made whole, in the activations' dtype, for every call: on CPU in float32, so that
    a product is that of the dequantized checkpoint to the bit.
    """
    arrays = (inputs, values, scales, minimums)
    return jax.lax.platform_dependent(*arrays, cpu=_grouped_on_cpu, default=_grouped)


def _grouped(
    inputs: jax.Array, values: jax.Array, scales: jax.Array, minimums: jax.Array | None
) -> jax.Array:
    matrix = dequantized(values, scales, minimums, axis=0).astype(inputs.dtype)
    flat = matrix.reshape(matrix.shape[0], -1)
    products = jnp.dot(inputs, flat, preferred_element_type=jnp.float32)
    return products.reshape(-1, *matrix.shape[1:])


def _grouped_on_cpu(
    inputs: jax.Array, values: jax.Array, scales: jax.Array, minimums: jax.Array | None
) -> jax.Array:
    # After the rows are there, or all matrices of a step are made at once, in fresh memory.
    arrays = jax.lax.optimization_barrier((inputs, values, scales, minimums))
    inputs, values, scales, minimums = arrays
    # Besides, XLA:CPU makes the matrix anew within a product of one row, four times slower.
    return with_no_rows_left_over(lambda rows: _grouped(rows, values, scales, minimums), inputs)


def float8_matmul(inputs: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """See ``pallas_kernels.quantized_matmul``."""
    rows, row_scales = float8_rows(inputs)
    flat = values.reshape(-1, values.shape[-1])
    products = _product(rows, flat, jnp.float32).reshape(-1, *scales.shape)
    return _scaled(products, row_scales, scales)


def _with_8_bits(inputs: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    row_scales, integers = _quantize_rows(inputs, 127)
    sums = _integer_product(integers.astype(jnp.int8), values)
    return _scaled(sums.astype(jnp.float32), row_scales, scales)


def _with_8_bit_groups(
    inputs: jax.Array, values: jax.Array, scales: jax.Array, *, group: int
) -> jax.Array:
    """[T, I], [O, I], [O] -> [T, O]: integers of activations, as the floats they stand for.

    Of the integers themselves it would be a product for each group, which takes XLA:CPU 60 times
    as long for 512 rows (docs/log.md).
    """
    inputs, values = jax.lax.optimization_barrier((inputs, values))  # see _grouped_on_cpu
    group_scales, integers = _quantize_rows(inputs.reshape(-1, group), 127)
    rows = (integers * group_scales[:, None]).reshape(inputs.shape)
    floats = values.astype(jnp.float32)
    products = with_no_rows_left_over(lambda rows: _product(rows, floats, jnp.float32), rows)
    return products * scales[None]


def _with_two_planes(inputs: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """Twice the rows: next to nothing where the reading of ``values`` is what takes time."""
    num_rows = inputs.shape[0]
    row_scales, integers = _quantize_rows(inputs, MAX_16_BIT)
    high = (integers + _MAX_LOW) >> 7
    low = integers - high * _PLANE
    planes = jnp.concatenate([high, low]).astype(jnp.int8)
    sums = _integer_product(planes, values).astype(jnp.float32)
    return _scaled(sums[:num_rows] * _PLANE + sums[num_rows:], row_scales, scales)


def _with_floats(inputs: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """The integers as floats, exactly, in the activations' dtype."""
    products = _product(inputs, values.astype(inputs.dtype), jnp.float32)
    return products * scales[None]


def _quantize_rows(inputs: jax.Array, largest: int) -> tuple[jax.Array, jax.Array]:
    """float32 [T] and int32 [T, I...]: what one stands for in each row, and the row in it."""
    x = inputs.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), keepdims=True) / largest
    integers = jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int32)
    return scale.reshape(-1), integers


def _integer_product(rows: jax.Array, values: jax.Array) -> jax.Array:
    if rows.shape[0] > 1:
        return _product(rows, values, jnp.int32)
    # XLA:CPU's product of one row takes nine times as long as that of two.
    return _product(jnp.concatenate([rows, rows]), values, jnp.int32)[:1]


def _product(rows: jax.Array, values: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    num_inputs = rows.ndim - 1
    axes = tuple(range(1, rows.ndim)), tuple(range(values.ndim - num_inputs, values.ndim))
    return jax.lax.dot_general(rows, values, (axes, ((), ())), preferred_element_type=dtype)


def _scaled(sums: jax.Array, row_scales: jax.Array, scales: jax.Array) -> jax.Array:
    rows = row_scales.reshape(-1, *[1] * scales.ndim)
    return sums * rows * scales[None]
