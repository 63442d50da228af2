"""A matrix of floats that notes what it is multiplied with, for calibration."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.row_blocks import padded_rows, with_no_rows_left_over


def float_product(inputs: jax.Array, matrix: jax.Array) -> jax.Array:
    """[T, I...] times [I..., O...]: [T, O...] float32."""
    if padded_rows(inputs.shape[0]) == inputs.shape[0]:
        return _product(inputs, matrix)
    return jax.lax.platform_dependent(inputs, matrix, cpu=_product_on_cpu, default=_product)


def _product(inputs: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.tensordot(inputs, matrix, inputs.ndim - 1, preferred_element_type=jnp.float32)


def _product_on_cpu(inputs: jax.Array, matrix: jax.Array) -> jax.Array:
    return with_no_rows_left_over(lambda rows: _product(rows, matrix), inputs)


@dataclass(frozen=True)
class RecordedMatrix:
    """Stands for a declared matrix and its arrays; ``rows`` get the inputs, [T, I]."""

    values: jax.Array
    rows: list[jax.Array]

    @property
    def matrix(self) -> "RecordedMatrix":
        """Itself."""
        return self

    def product(self, inputs: jax.Array) -> jax.Array:
        """[T, I...] -> [T, O...] float32."""
        self.rows.append(inputs.reshape(inputs.shape[0], -1))
        return float_product(inputs, self.values)
