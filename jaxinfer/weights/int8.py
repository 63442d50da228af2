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

from jaxinfer.weights.by_output import OutputScaledWeight
from jaxinfer.weights.integers import GROUPS
from jaxinfer.weights.protocol import Array, Format, QuantizedMatrix, check_field
from jaxinfer.weights.split import ProductAxes, split_product
from pallas_kernels.quantized_matmul import int8_matmul


@dataclass(frozen=True)
class Int8Format(Format):
    """8-bit integers with a float32 scale for each output.

    ``activation_bits`` and ``activation_group``: see ``int8_matmul``.
    """

    activation_bits: int = 16
    activation_group: int | None = None

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for what there is not."""
        check_field("activation_bits", self.activation_bits, (8, 16))
        check_field("activation_group", self.activation_group, (None, *GROUPS))

    @property
    def multiplies_integers(self) -> bool:
        """Tells if activations have one scale for all inputs: XLA:CPU rounds them to integers."""
        return self.activation_group is None

    def weight(
        self, matrix: jax.Array, axes: tuple[str | None, ...], inputs: tuple[int, ...]
    ) -> "Int8Weight":
        """Returns ``matrix`` in this format."""
        return Int8Weight(matrix, axes, inputs, self)


class Int8Weight(OutputScaledWeight):
    """``values`` int8 [O..., I] and ``scales`` float32 [O...] in place of a matrix."""

    form: Int8Format

    def check_division(self, num_devices: int) -> None:
        """Raises ``ValueError`` where inputs divided over devices are not whole groups there."""
        group = self.form.activation_group
        if group is not None and self.num_inputs % (group * num_devices):
            over = f" over {num_devices} devices" if num_devices > 1 else ""
            raise ValueError(f"{self.num_inputs} inputs{over} are no groups of {group}")

    def quantize(self, matrix: Array) -> Mapping[str, Any]:
        """``values`` and ``scales`` of a matrix, numpy's for numpy's."""
        numpy: Any = np if isinstance(matrix, np.ndarray) else jnp
        ordered = self.outputs_first(matrix).astype(numpy.float32)
        # Not divided by 127: XLA would do this instead, and numpy's would have other last bits.
        scales = numpy.max(numpy.abs(ordered), axis=-1) * np.float32(1 / 127)
        steps = numpy.where(scales == 0, 1, scales)[..., None]
        return {"values": numpy.round(ordered / steps).astype(numpy.int8), "scales": scales}

    @property
    def matrix(self) -> "Int8Matrix":
        """The arrays, to multiply with."""
        form = self.form
        axes = self.values.get_metadata()["out_sharding"]
        return Int8Matrix(
            self.values[...], self.scales[...], axes, form.activation_bits, form.activation_group
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("axes", "activation_bits", "activation_group"),
)
@dataclass(frozen=True)
class Int8Matrix(QuantizedMatrix):
    """``values`` int8 [O..., I] and ``scales`` float32 [O...], the transpose of a matrix.

    The others: see ``int8_matmul``.
    """

    values: jax.Array
    scales: jax.Array
    axes: tuple[str | None, ...]
    activation_bits: int
    activation_group: int | None = None

    def product(self, inputs: jax.Array) -> jax.Array:
        """[T, I...] -> [T, O...] float32."""
        multiply = functools.partial(
            int8_matmul,
            activation_bits=self.activation_bits,
            activation_group=self.activation_group,
        )
        rows, (*outputs, last) = inputs.reshape(inputs.shape[0], -1), self.axes
        arrays, axes = (self.values, self.scales), (self.axes, tuple(outputs))
        return split_product(multiply, rows, arrays, axes, ProductAxes(last, tuple(outputs)))

    def grouped_product(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """[N, I] -> [N, O] float32 with one of the matrices [X, O, I] for each group of rows."""
        groups = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
        matrices = self.values.astype(rows.dtype).swapaxes(1, 2)
        products = jax.lax.ragged_dot(rows, matrices, sizes, preferred_element_type=jnp.float32)
        return products * self.scales[groups]

    def outputs(self, indices: jax.Array) -> jax.Array:
        """[N] -> [N, E] float32: what the outputs of a matrix [O, E] are made of."""
        return self.values[indices] * self.scales[indices][:, None]
