"""Matrices of 8-bit integers with one scale for each output.

w = round(w / s) * s with s = max |w| / 127 over the inputs of an output: symmetric, to the nearest
(Jacob et al. 2018, section 2.1, without zero points).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.quantized_matmul import int8_matmul


class Int8Weight(nnx.Module):
    """``values`` int8 [O..., I...] and ``scales`` float32 [O...] in place of a matrix.

    ``inputs`` are the axes of the matrix that a product sums over; they come last here, in order,
    so that an output's numbers lie together. ``activation_bits``: see ``int8_matmul``.
    """

    def __init__(
        self,
        matrix: jax.Array,
        axes: tuple[str | None, ...],
        inputs: tuple[int, ...],
        activation_bits: int,
    ) -> None:
        self.inputs, self.activation_bits = inputs, activation_bits
        arrays: Any = self.quantize(matrix)
        outputs = tuple(axis for i, axis in enumerate(axes) if i not in inputs)
        whole = outputs + tuple(axes[i] for i in inputs)
        self.values = nnx.Param(arrays["values"], out_sharding=whole)
        self.scales = nnx.Param(arrays["scales"], out_sharding=outputs)

    def quantize(self, matrix: np.ndarray | jax.Array) -> Mapping[str, np.ndarray | jax.Array]:
        """``values`` and ``scales`` of a matrix, numpy's for numpy's."""
        numpy: Any = np if isinstance(matrix, np.ndarray) else jnp
        num_axes, num_inputs = matrix.ndim, len(self.inputs)
        outputs = [axis for axis in range(num_axes) if axis not in self.inputs]
        ordered = matrix.transpose(*outputs, *self.inputs).astype(numpy.float32)
        over = tuple(range(num_axes - num_inputs, num_axes))
        scales = numpy.max(numpy.abs(ordered), axis=over, keepdims=True) / np.float32(127)
        values = numpy.round(ordered / numpy.where(scales == 0, 1, scales)).astype(numpy.int8)
        return {"values": values, "scales": scales.reshape(scales.shape[: num_axes - num_inputs])}

    @property
    def matrix(self) -> "Int8Matrix":
        """The arrays, to multiply with."""
        return Int8Matrix(self.values[...], self.scales[...], self.activation_bits)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("activation_bits",),
)
@dataclass(frozen=True)
class Int8Matrix:
    """``values`` int8 [O..., I...] and ``scales`` float32 [O...], the transpose of a matrix."""

    values: jax.Array
    scales: jax.Array
    activation_bits: int

    def product(self, inputs: jax.Array) -> jax.Array:
        """[T, I...] -> [T, O...] float32."""
        return int8_matmul(inputs, self.values, self.scales, activation_bits=self.activation_bits)

    def grouped_product(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """[N, I] -> [N, O] float32 with one of the matrices [X, O, I] for each group of rows."""
        groups = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
        matrices = self.values.astype(rows.dtype).swapaxes(1, 2)
        products = jax.lax.ragged_dot(rows, matrices, sizes, preferred_element_type=jnp.float32)
        return products * self.scales[groups]

    def outputs(self, indices: jax.Array) -> jax.Array:
        """[N] -> [N, E] float32: what the outputs of a matrix [O, E] are made of."""
        return self.values[indices] * self.scales[indices][:, None]
