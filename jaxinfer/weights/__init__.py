"""How matrices are held: in a float dtype, or quantized.

A matrix is declared once, by its logical shape and which of its axes are summed over. What comes
back is a plain parameter or a module whose class knows its arrays, how to make them and how to
multiply with them; models, sharding and checkpoints know no format by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.config import DtypePolicy
from jaxinfer.weights.int8 import Int8Matrix, Int8Weight

Array = np.ndarray | jax.Array
# A matrix in float32 -> the arrays of its format, by their names.
Quantizer = Callable[[Array], Mapping[str, Array]]
Weight = nnx.Param[jax.Array] | Int8Weight
Matrix = jax.Array | Int8Matrix

# Name of a format -> its matrix, given initial values, logical axes and the axes summed over.
FORMATS: Mapping[str, Callable[..., Int8Weight]] = {
    "int8": lambda *matrix: Int8Weight(*matrix, activation_bits=16),
    "int8-dynamic": lambda *matrix: Int8Weight(*matrix, activation_bits=8),
}


def declare(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    dtypes: DtypePolicy,
    axes: tuple[str | None, ...],
    inputs: tuple[int, ...],
) -> Any:
    """A matrix of logical ``shape`` with ``axes``, of which ``inputs`` are summed over.

    Initialised normal(n^-1/2), n the size of ``inputs``.
    """
    fan_in = int(np.prod([shape[axis] for axis in inputs]))
    initializer = jax.nn.initializers.normal(fan_in**-0.5)
    value = initializer(rngs.params(), shape, jnp.dtype(dtypes.weights))
    if dtypes.quantization is None:
        return nnx.Param(value, out_sharding=axes)
    return FORMATS[dtypes.quantization](value, axes, inputs)


def quantizers(module: Any) -> dict[tuple[Any, ...], Quantizer]:
    """Of every quantized matrix in ``module``, by its path: what makes its arrays."""
    return {
        tuple(path): node.quantize
        for path, node in nnx.iter_graph(module)
        if isinstance(node, Int8Weight)
    }


def matrix(weight: Weight) -> Matrix:
    """The arrays of a declared matrix, to multiply with."""
    return weight.matrix if isinstance(weight, Int8Weight) else weight[...]


def product(inputs: jax.Array, matrix: Matrix) -> jax.Array:
    """[T, I...] times a matrix [I..., O...]: [T, O...] float32."""
    if isinstance(matrix, Int8Matrix):
        return matrix.product(inputs)
    return jnp.tensordot(inputs, matrix, inputs.ndim - 1, preferred_element_type=jnp.float32)


def grouped_product(rows: jax.Array, matrices: Matrix, sizes: jax.Array) -> jax.Array:
    """[N, I] and matrices [X, I, O] -> [N, O] float32: the first ``sizes[0]`` rows times the first
    matrix, the next ``sizes[1]`` times the second, and so on.

    What stands in rows behind the last group has no meaning.
    """
    if isinstance(matrices, Int8Matrix):
        return matrices.grouped_product(rows, sizes)
    return jax.lax.ragged_dot(rows, matrices, sizes, preferred_element_type=jnp.float32)


def outputs(matrix: Matrix, indices: jax.Array, axis: int) -> jax.Array:
    """[N] -> [N, I]: what some outputs of a matrix with two axes are made of.

    ``axis`` is that of the outputs, the other one a product would sum over.
    """
    if isinstance(matrix, Int8Matrix):
        return matrix.outputs(indices)
    return matrix[indices] if axis == 0 else matrix[:, indices].T
