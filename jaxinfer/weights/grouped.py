"""Matrices of 8- or 4-bit integers with a scale, and perhaps a minimum, for each group of inputs.

w = d q, or d q + m with a minimum, in groups of inputs of an output: the numbers of llama.cpp's
Q8_0, Q4_0 and Q4_1 (``ggml-quants.c``, ``quantize_row_*_ref``), in groups of any size.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.sharding import RULES
from jaxinfer.weights.integers import GROUPS, Integers
from jaxinfer.weights.protocol import (
    Array,
    Format,
    QuantizedMatrix,
    QuantizedWeight,
    check_field,
)
from jaxinfer.weights.rounding import nearest, steps_of_groups
from jaxinfer.weights.split import ProductAxes, split_product
from pallas_kernels.quantized_matmul import grouped_matmul
from pallas_kernels.quantized_matmul.nibbles import pack_nibbles, unpack_nibbles
from pallas_kernels.quantized_matmul.reference import dequantized


@dataclass(frozen=True)
class GroupedFormat(Format):
    """Integers of ``bits`` with a scale for each ``group`` inputs of an output.

    ``scales`` and ``minimums`` are dtypes; without ``minimums`` integers are symmetric.
    """

    bits: int
    group: int
    minimums: str | None = None
    scales: str = "float16"

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for what there is not."""
        check_field("bits", self.bits, (4, 8))
        check_field("group", self.group, GROUPS)
        check_field("minimums", self.minimums, (None, "float16", "float32"))
        check_field("scales", self.scales, ("float16", "float32"))

    def weight(
        self, matrix: jax.Array, axes: tuple[str | None, ...], inputs: tuple[int, ...]
    ) -> "GroupedWeight":
        """Returns ``matrix`` in this format, or in smaller groups of it where none else fit."""
        return GroupedWeight(matrix, axes, inputs, self)


class GroupedWeight(QuantizedWeight):
    """``values``, ``scales`` and perhaps ``minimums`` in place of a matrix: see ``grouped_matmul``.

    The axes are the matrix's, those summed over (``inputs``, next to each other) as one, which is
    called what the first of them is. So are those behind them where devices divide none but the
    first: what is tiled in a device's memory are the last two. Groups are the largest of
    ``GROUPS`` that divide the last of ``inputs`` (so that devices can share whole heads), but no
    larger than ``form`` says; ``ValueError`` where none does.
    """

    def __init__(
        self,
        matrix: jax.Array,
        axes: tuple[str | None, ...],
        inputs: tuple[int, ...],
        form: GroupedFormat,
    ) -> None:
        self.inputs, self.shape = inputs, tuple(matrix.shape)
        self.num_inputs = math.prod(matrix.shape[axis] for axis in inputs)
        last = matrix.shape[inputs[-1]]
        fitting = [n for n in GROUPS if n <= form.group and last % n == 0]
        if not fitting:
            raise ValueError(f"{last} inputs are no multiple of {GROUPS[0]}")
        self.form = replace(form, group=max(fitting))
        self.axis, last = inputs[0], inputs[-1]
        are_divided = any(axis in RULES for axis in axes[last + 2 :])
        self.merged = () if are_divided else tuple(matrix.shape[last + 2 :])
        behind = axes[last + 1 : last + 2] if self.merged else axes[last + 1 :]
        named = (*axes[: self.axis + 1], *behind)
        arrays = self.quantize(matrix)
        self.values = nnx.Param(arrays["values"], out_sharding=named)
        self.scales = nnx.Param(arrays["scales"], out_sharding=named)
        if form.minimums is not None:
            self.minimums = nnx.Param(arrays["minimums"], out_sharding=named)

    def check_division(self, num_devices: int) -> None:
        """Raises ``ValueError`` where inputs divided over devices are not whole groups there."""
        if self.num_inputs % (self.form.group * num_devices):
            over = f" over {num_devices} devices" if num_devices > 1 else ""
            raise ValueError(f"{self.num_inputs} inputs{over} are no groups of {self.form.group}")

    def quantize(self, matrix: Array) -> Mapping[str, Any]:
        """The arrays of a matrix, numpy's for numpy's; to the nearest."""
        groups = self.in_groups(matrix)
        scales, minimums = steps_of_groups(groups, self.form, self.axis + 1)
        return self.arrays(nearest(groups, scales, minimums, self.form), scales, minimums)

    def dequantize(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """The matrix that the arrays stand for, in float32 and its own axes."""
        parts = arrays["values"], arrays["scales"], arrays.get("minimums")
        return dequantized(*parts, axis=self.axis).reshape(self.shape)

    def from_stored(self, parts: Integers) -> Mapping[str, np.ndarray]:
        """Returns the arrays of a matrix that a file stores as integers, of the same numbers.

        ``parts`` have the matrix's axes, those of scales and minimums with the last of the inputs
        a ``group``-th as long.
        """
        minimums = parts.minimums
        if self.form.minimums is not None and minimums is None:
            minimums = np.zeros_like(parts.scales)
        return self.arrays(
            self.in_groups(parts.values),
            parts.scales.astype(self.form.scales),
            None if minimums is None else minimums.astype(self.form.minimums or "float16"),
        )

    def integers(self, arrays: Mapping[str, np.ndarray]) -> Integers:
        """Returns what ``from_stored`` made ``arrays`` of."""
        form, last = self.form, self.inputs[-1]
        values = arrays["values"]
        if form.bits == 4:
            values = unpack_nibbles(values, form.group, self.axis).astype(np.int8)
            values -= np.int8(8 if form.minimums is None else 0)
        groups = [n // form.group if axis == last else n for axis, n in enumerate(self.shape)]
        minimums = arrays["minimums"].reshape(groups) if form.minimums is not None else None
        return Integers(values.reshape(self.shape), arrays["scales"].reshape(groups), minimums)

    @property
    def matrix(self) -> "GroupedMatrix":
        """The arrays, to multiply with."""
        minimums = self.minimums[...] if self.form.minimums is not None else None
        values = self.values[...]
        num_behind = values.ndim - 1 - self.axis
        axes = self.values.get_metadata()["out_sharding"]
        return GroupedMatrix(values, self.scales[...], minimums, axes, num_behind, self.merged)

    def in_groups(self, array: Array) -> Any:
        """[..., I..., O...] -> [..., I/G, G, O...]."""
        before, after = array.shape[: self.axis], array.shape[self.inputs[-1] + 1 :]
        return array.reshape(*before, -1, self.form.group, *after)

    def arrays(self, groups: Any, scales: Any, minimums: Any) -> dict[str, Any]:
        """Packs integers [..., I/G, G, O...], their scales and minimums [..., I/G, 1,
        O...].
        """
        axis, form = self.axis, self.form
        before, after = groups.shape[:axis], groups.shape[axis + 2 :]
        if self.merged:
            after = (math.prod(after),)
        values = groups.reshape(*before, -1, *after)
        if form.bits == 4:
            values = pack_nibbles(values + (8 if form.minimums is None else 0), form.group, axis)
        shape = (*before, groups.shape[axis], *after)
        arrays = {"values": values, "scales": scales.reshape(shape)}
        return arrays if minimums is None else arrays | {"minimums": minimums.reshape(shape)}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales", "minimums"),
    meta_fields=("axes", "num_behind", "merged"),
)
@dataclass(frozen=True)
class GroupedMatrix(QuantizedMatrix):
    """The arrays of ``grouped_matmul``; the axis of inputs has ``num_behind`` others behind it.

    ``merged``: sizes of outputs that are one axis with the one before them.
    """

    values: jax.Array
    scales: jax.Array
    minimums: jax.Array | None
    axes: tuple[str | None, ...]
    num_behind: int
    merged: tuple[int, ...] = ()

    def product(self, inputs: jax.Array) -> jax.Array:
        """[T, I...] -> [T, O...] float32."""
        rows = inputs.reshape(inputs.shape[0], -1)
        arrays, (first, *outputs) = (self.values, self.scales, self.minimums), self.axes
        products = split_product(
            grouped_matmul, rows, arrays, (self.axes,) * 3, ProductAxes(first, tuple(outputs))
        )
        return products.reshape(rows.shape[0], -1, *self.merged) if self.merged else products

    def grouped_product(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """[N, I] -> [N, O] float32 with one of the matrices [X, I, O] for each group of rows."""
        matrices = dequantized(self.values, self.scales, self.minimums, axis=1)
        return jax.lax.ragged_dot(
            rows, matrices.astype(rows.dtype), sizes, preferred_element_type=jnp.float32
        )

    def outputs(self, indices: jax.Array) -> jax.Array:
        """[N] -> [N, I] float32: what the outputs of a matrix of two axes are made of."""
        axis = self.values.ndim - 1 - self.num_behind
        arrays = (self.values, self.scales, self.minimums)
        parts = [None if a is None else jnp.take(a, indices, axis=1 - axis) for a in arrays]
        values, scales, minimums = parts
        assert values is not None
        assert scales is not None
        numbers = dequantized(values, scales, minimums, axis=axis)
        return numbers.T if axis == 0 else numbers
