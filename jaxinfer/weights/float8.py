"""Matrices of 8-bit floats with one scale for each output.

w = e4m3(w / s) s with s = max |w| / 448 over the inputs of an output (Micikevicius et al. 2022,
"FP8 formats for deep learning").
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxinfer.weights.by_output import OutputScaledWeight
from jaxinfer.weights.protocol import Array, Format, QuantizedMatrix
from pallas_kernels.quantized_matmul import float8_matmul

_LARGEST = np.float32(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)


@dataclass(frozen=True)
class Float8Format(Format):
    """8-bit floats (e4m3) with a float32 scale for each output, times activations in 8-bit floats.

    For devices that multiply them: see ``check_device``.
    """

    def weight(
        self, matrix: jax.Array, axes: tuple[str | None, ...], inputs: tuple[int, ...]
    ) -> "Float8Weight":
        """Returns ``matrix`` in this format."""
        return Float8Weight(matrix, axes, inputs, self)

    def check_device(self, name: str, device: Any) -> None:
        """Raises ``ValueError`` for a ``device`` that has no products of 8-bit floats."""
        if device.platform == "gpu":
            has_float8 = float(device.compute_capability) >= 8.9
        else:
            has_float8 = device.platform == "tpu" and re.search(r"TPU ?v?7", device.device_kind)
        if not has_float8:
            raise ValueError(
                f"{name} needs products of 8-bit floats: NVIDIA GPUs of compute capability 8.9 or "
                f"more, TPU v7; this is {device.device_kind or device.platform}: give int8"
            )


class Float8Weight(OutputScaledWeight):
    """``values`` float8_e4m3fn [O..., I] and ``scales`` float32 [O...]."""

    def quantize(self, matrix: Array) -> Mapping[str, Any]:
        """``values`` and ``scales`` of a matrix, numpy's for numpy's."""
        numpy: Any = np if isinstance(matrix, np.ndarray) else jnp
        ordered = self.outputs_first(matrix).astype(numpy.float32)
        scales = numpy.max(numpy.abs(ordered), axis=-1) * np.float32(1 / _LARGEST)  # see int8.py
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
class Float8Matrix(QuantizedMatrix):
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
