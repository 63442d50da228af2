"""Products of activations with matrices of 8-bit integers.

Axis letters: T rows, I inputs (one axis or several), O outputs (one axis or several). A matrix
[O..., I...] stands for ``values * scales``: one scale for each output, since a product can then be
taken of the integers alone.
"""

from collections.abc import Mapping
from typing import Any

import jax

from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantized_matmul import reference, xla

__all__ = ["IMPLEMENTATIONS", "int8_matmul"]

# The first that does not decline is taken; `reference` is the definition, never the fast path.
IMPLEMENTATIONS: Mapping[str, Any] = {"xla": xla, "reference": reference}


def int8_matmul(
    inputs: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activation_bits: int,
    backend: str | None = None,
) -> jax.Array:
    """[T, I...] times the transpose of ``values * scales``: [T, O...] float32.

    ``values`` int8 [O..., I...], ``scales`` float32 [O...]. ``activation_bits`` 8: each row of
    ``inputs`` is rounded to integers in [-127, 127] of its own scale, max |row| / 127 (Dettmers et
    al. 2022 without outliers), wherever it runs. 16: rows keep their precision, or as much of it
    as 15 bits hold. Raises ``ValueError`` for shapes that do not fit together.
    """
    if activation_bits not in (8, 16):
        raise ValueError(f"activation_bits must be 8 or 16, got {activation_bits}")
    num_inputs = inputs.ndim - 1
    if values.shape[values.ndim - num_inputs :] != inputs.shape[1:]:
        raise ValueError(f"rows {inputs.shape[1:]} do not fit a matrix {values.shape}")
    if scales.shape != values.shape[: values.ndim - num_inputs]:
        raise ValueError(f"scales {scales.shape} do not fit a matrix {values.shape}")
    return dispatch(
        "int8_matmul",
        {name: module.int8_matmul for name, module in IMPLEMENTATIONS.items()},
        backend,
        inputs,
        values,
        scales,
        activation_bits=activation_bits,
    )
