"""Matrices of small numbers with one scale for each output, whatever these numbers are."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxinfer.weights.integers import Integers
from jaxinfer.weights.protocol import Array, QuantizedWeight


class OutputScaledWeight(QuantizedWeight):
    """``values`` [O..., I] and ``scales`` float32 [O...] in place of a matrix.

    ``inputs`` are the axes of the matrix that a product sums over, next to each other; they come
    last here, as one that is called what the first of them is, so that an output's numbers lie
    together and fill the tiles of a device's memory.
    """

    def __init__(
        self,
        matrix: jax.Array,
        axes: tuple[str | None, ...],
        inputs: tuple[int, ...],
        form: Any,
    ) -> None:
        self.inputs, self.form, self.shape = inputs, form, tuple(matrix.shape)
        self.num_inputs = math.prod(matrix.shape[axis] for axis in inputs)
        self.check_division(1)
        arrays: Any = self.quantize(matrix)
        outputs = tuple(axis for i, axis in enumerate(axes) if i not in inputs)
        self.values = nnx.Param(arrays["values"], out_sharding=(*outputs, axes[inputs[0]]))
        self.scales = nnx.Param(arrays["scales"], out_sharding=outputs)

    def dequantize(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """The matrix that ``values`` and ``scales`` stand for, in float32 and its own axes."""
        outputs = [axis for axis in range(len(self.shape)) if axis not in self.inputs]
        order = (*outputs, *self.inputs)
        numbers = arrays["values"].astype(np.float32) * arrays["scales"][..., None]
        return numbers.reshape([self.shape[axis] for axis in order]).transpose(np.argsort(order))

    def from_stored(self, parts: Integers) -> Mapping[str, np.ndarray]:
        """Returns the arrays of a matrix that a file stores as integers, of the same numbers.

        ``parts`` have the matrix's axes, of which ``inputs`` are 1 in the scales.
        """
        values, scales = self.outputs_first(parts.values), self.outputs_first(parts.scales)
        return {
            "values": np.ascontiguousarray(values),
            "scales": np.ascontiguousarray(scales[..., 0], np.float32),
        }

    def integers(self, arrays: Mapping[str, np.ndarray]) -> Integers:
        """Returns what ``from_stored`` made ``arrays`` of."""
        outputs = [axis for axis in range(len(self.shape)) if axis not in self.inputs]
        order = (*outputs, *self.inputs)
        back = np.argsort(order)
        values = arrays["values"].reshape([self.shape[axis] for axis in order])
        ones = [1 if axis in self.inputs else self.shape[axis] for axis in order]
        return Integers(values.transpose(back), arrays["scales"].reshape(ones).transpose(back))

    def outputs_first(self, array: Array) -> Any:
        """[..., I..., O...] -> [..., O..., I]."""
        outputs = [axis for axis in range(array.ndim) if axis not in self.inputs]
        shape = [array.shape[axis] for axis in outputs]
        return array.transpose(*outputs, *self.inputs).reshape(*shape, -1)
