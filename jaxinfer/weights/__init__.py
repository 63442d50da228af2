"""Formats of matrices: a float dtype, or quantized.

A matrix is declared once, by its logical shape and which of its axes are summed over. What comes
back is a plain parameter or a module whose class knows its arrays, how to make them and how to
multiply with them; models, sharding and checkpoints know no format by name.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import DtypePolicy
from jaxinfer.declaration import Declaration, declaration_of
from jaxinfer.sharding import RULES
from jaxinfer.weights.formats import FORMATS, kinds_of_formats, parse_format
from jaxinfer.weights.grouped import GroupedFormat
from jaxinfer.weights.int8 import Int8Format
from jaxinfer.weights.integers import Integers
from jaxinfer.weights.protocol import Format, QuantizedMatrix, QuantizedWeight
from jaxinfer.weights.recorded import RecordedMatrix, float_product

__all__ = ["FORMATS", "Format", "GroupedFormat", "Int8Format", "Integers", "MatrixPath"]
__all__ += ["QuantizedWeight", "Weight", "declare", "grouped_product", "kinds_of_formats"]
__all__ += ["matrix", "multiplies_floats", "outputs", "parse_format", "product"]
__all__ += ["quantize_module", "quantized_weights", "record_rows"]

Weight = nnx.Param[jax.Array] | QuantizedWeight
Matrix = jax.Array | QuantizedMatrix
MatrixPath = tuple[str | int, ...]


def declare(rngs: nnx.Rngs, dtypes: DtypePolicy, declaration: Declaration) -> Any:
    """Declares a matrix, initialised normal(n^-1/2), n the number of its inputs.

    ``quantize_module`` puts another format in its place.
    """
    initializer = jax.nn.initializers.normal(declaration.num_inputs**-0.5)
    value = initializer(rngs.params(), declaration.shape, jnp.dtype(dtypes.weights))
    return declaration.parameter(value, can_quantize=True)


def quantize_module(module: Any, dtypes: DtypePolicy, num_devices: int = 1) -> None:
    """Puts the formats that ``dtypes`` ask for in place of the declared matrices of ``module``.

    Raises ``ValueError`` naming a matrix that cannot be in its format, or not divided over
    ``num_devices``.
    """
    if dtypes.quantization is None:
        return
    single = None if dtypes.matrix_formats else parse_format(dtypes.quantization)
    several = dict(dtypes.matrix_formats)
    for path, owner, name, declared in list(_declared(module)):
        form = single or several.get((*path, name))
        if form is None:
            continue
        try:
            declaration = declaration_of(declared)
            axes, inputs = declaration.axes, declaration.inputs
            weight = form.weight(declared.get_value(), axes, inputs)
            if axes[inputs[0]] in RULES:
                weight.check_division(num_devices)
        except ValueError as error:
            where = ".".join(map(str, (*path, name)))
            raise ValueError(f"{where} in {dtypes.quantization}: {error}") from error
        setattr(owner, name, weight)


def _declared(module: Any) -> Iterator[tuple[MatrixPath, Any, str, Any]]:
    """Every declared matrix, with the module that has it, that module's path, and its name."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param) and value.get_metadata().get("can_quantize"):
                    yield _plain(path), node, name, value


def quantized_weights(module: Any) -> dict[MatrixPath, QuantizedWeight]:
    """Every quantized matrix in ``module``, by its path."""
    return {
        _plain(path): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, QuantizedWeight)
    }


def record_rows(module: Any) -> dict[MatrixPath, list[jax.Array]]:
    """The rows [T, I] that the declared matrices of ``module`` are multiplied with from now on.

    For one call within one trace. Matrices of experts, whose rows are not the batch's, are left.
    """
    recorded: dict[MatrixPath, list[jax.Array]] = {}
    for path, owner, name, declared in list(_declared(module)):
        if declaration_of(declared).inputs[0] == 0:
            rows = recorded.setdefault((*path, name), [])
            setattr(owner, name, RecordedMatrix(declared[...], rows))
    return recorded


def _plain(path: tuple[Any, ...]) -> MatrixPath:
    return path


def multiplies_floats(dtypes: DtypePolicy) -> bool:
    """Tells if XLA:CPU's products of matrices are of floats, not of integers."""
    if dtypes.quantization is None:
        return True
    forms = [form for _, form in dtypes.matrix_formats] or [parse_format(dtypes.quantization)]
    return not any(form.multiplies_integers for form in forms)


def matrix(weight: Weight) -> Matrix:
    """The arrays of a declared matrix, to multiply with."""
    return weight.matrix if isinstance(weight, QuantizedWeight | RecordedMatrix) else weight[...]


def product(inputs: jax.Array, matrix: Matrix) -> jax.Array:
    """[T, I...] times a matrix [I..., O...]: [T, O...] float32."""
    if isinstance(matrix, QuantizedMatrix | RecordedMatrix):
        return matrix.product(inputs)
    return float_product(inputs, matrix)


def grouped_product(rows: jax.Array, matrices: Matrix, sizes: jax.Array) -> jax.Array:
    """[N, I] and matrices [X, I, O] -> [N, O] float32: the first ``sizes[0]`` rows times the first
    matrix, the next ``sizes[1]`` times the second, and so on.

    What stands in rows behind the last group has no meaning.
    """
    if isinstance(matrices, QuantizedMatrix):
        return matrices.grouped_product(rows, sizes)
    return jax.lax.ragged_dot(rows, matrices, sizes, preferred_element_type=jnp.float32)


def outputs(matrix: Matrix, indices: jax.Array, axis: int) -> jax.Array:
    """[N] -> [N, I]: what some outputs of a matrix with two axes are made of.

    ``axis`` is that of the outputs, the other one a product would sum over.
    """
    if isinstance(matrix, QuantizedMatrix):
        return matrix.outputs(indices)
    return matrix[indices] if axis == 0 else matrix[:, indices].T
