"""Matrices of 8-bit floats with one scale for each output.

w = e4m3(w / s) s with s = max |w| / 448 over the inputs of an output (Micikevicius et al. 2022,
"FP8 formats for deep learning").
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxinfer.weights.by_output import Array, OutputScaledWeight
from pallas_kernels.quantized_matmul import float8_matmul

_LARGEST = np.float32(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)


class Float8Weight(OutputScaledWeight):
    """``values`` float8_e4m3fn [O..., I] and ``scales`` float32 [O...]."""

    def check_division(self, num_devices: int) -> None:
        """Inputs are in no groups: any number of devices will do."""

    def quantize(self, matrix: Array) -> Mapping[str, Any]:
        """``values`` and ``scales`` of a matrix, numpy's for numpy's."""
        numpy: Any = np if isinstance(matrix, np.ndarray) else jnp
        ordered = self.outputs_first(matrix).astype(numpy.float32)
        scales = numpy.max(numpy.abs(ordered), axis=-1) / _LARGEST
        steps = numpy.where(scales == 0, 1, scales)[..., None]
        return {"values": (ordered / steps).astype(ml_dtypes.float8_e4m3fn), "scales": scales}

    @property
    def matrix(self) -> "Float8Matrix":
        """The arrays, to multiply with."""
        return Float8Matrix(self.values[...], self.scales[...])


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=()
)
@dataclass(frozen=True)
class Float8Matrix:
    """``values`` float8_e4m3fn [O..., I] and ``scales`` float32 [O...]."""

    values: jax.Array
    scales: jax.Array

    def product(self, inputs: jax.Array) -> jax.Array:
        """[T, I...] -> [T, O...] float32."""
        return float8_matmul(inputs.reshape(inputs.shape[0], -1), self.values, self.scales)

    def grouped_product(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """[N, I] -> [N, O] float32 with one of the matrices [X, O, I] for each group of rows."""
        matrices = (self.values.astype(jnp.float32) * self.scales[..., None]).astype(rows.dtype)
        return jax.lax.ragged_dot(
            rows, matrices.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32
        )

    def outputs(self, indices: jax.Array) -> jax.Array:
        """[N] -> [N, E] float32: what the outputs of a matrix [O, E] are made of."""
        return self.values[indices].astype(jnp.float32) * self.scales[indices][:, None]
