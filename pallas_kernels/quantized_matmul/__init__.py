"""Products of activations with matrices of 8-bit and 4-bit integers, or of 8-bit floats.

Axis letters: T rows, I inputs (one axis or several), O outputs (one axis or several), G inputs of
a group. Two forms of matrices, by what their scales belong to:

- an output each, ``int8_matmul`` and ``float8_matmul``: a product can be taken of the small numbers
  alone. [O..., I...], so that those of an output lie together.
- a group of inputs of an output each, ``grouped_matmul``: integers are scaled before they are
  summed. [I, O...], so that a group's scales lie beside each other as its outputs do.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch
from pallas_kernels.quantized_matmul import reference, tpu, xla

__all__ = ["IMPLEMENTATIONS", "float8_matmul", "grouped_matmul", "int8_matmul"]

# The first that does not decline is taken; `reference` is the definition, never the fast path.
# Where "tpu" does not decline it is taken on TPUs only, and the next one elsewhere.
IMPLEMENTATIONS: Mapping[str, Any] = {"tpu": tpu, "xla": xla, "reference": reference}


def int8_matmul(
    inputs: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activation_bits: int,
    activation_group: int | None = None,
    backend: str | None = None,
) -> jax.Array:
    """[T, I...] times the transpose of ``values * scales``: [T, O...] float32.

    ``values`` int8 [O..., I...], ``scales`` float32 [O...]. ``activation_bits`` 8: each row of
    ``inputs``, or each ``activation_group`` numbers of a row, is rounded to integers in [-127, 127]
    of a scale of its own, max |x| / 127 (Dettmers et al. 2022 without outliers; Dai et al. 2021 for
    groups), wherever it runs. 16: rows keep their precision, or as much of it as 15 bits hold.
    Raises ``ValueError`` for shapes that do not fit together.
    """
    if activation_bits not in (8, 16):
        raise ValueError(f"activation_bits must be 8 or 16, got {activation_bits}")
    num_inputs = inputs.ndim - 1
    if values.shape[values.ndim - num_inputs :] != inputs.shape[1:]:
        raise ValueError(f"rows {inputs.shape[1:]} do not fit a matrix {values.shape}")
    if scales.shape != values.shape[: values.ndim - num_inputs]:
        raise ValueError(f"scales {scales.shape} do not fit a matrix {values.shape}")
    if activation_group is not None:
        if activation_bits != 8:
            raise ValueError("activation_group is for activation_bits 8")
        size = inputs.size // inputs.shape[0]
        if activation_group < 1 or size % activation_group:
            raise ValueError(f"rows of {size} cannot be cut into groups of {activation_group}")
    return dispatch(
        "int8_matmul",
        _candidates(
            "int8_matmul",
            backend,
            activation_bits=activation_bits,
            activation_group=activation_group,
        ),
        backend,
        inputs,
        values,
        scales,
    )


def float8_matmul(
    inputs: jax.Array, values: jax.Array, scales: jax.Array, *, backend: str | None = None
) -> jax.Array:
    """[T, I] times the transpose of ``values * scales``: [T, O...] float32.

    ``values`` float8_e4m3fn [O..., I], ``scales`` float32 [O...]. Each row of ``inputs`` is rounded
    to float8_e4m3fn too, with a scale of its own, max |row| / 448 (Micikevicius et al. 2022); sums
    are float32. Raises ``ValueError`` for shapes that do not fit together.
    """
    if inputs.ndim != 2 or values.shape[-1] != inputs.shape[1]:
        raise ValueError(f"rows {inputs.shape[1:]} do not fit a matrix {values.shape}")
    if scales.shape != values.shape[:-1]:
        raise ValueError(f"scales {scales.shape} do not fit a matrix {values.shape}")
    candidates = _candidates("float8_matmul", backend)
    return dispatch("float8_matmul", candidates, backend, inputs, values, scales)


def grouped_matmul(
    inputs: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    minimums: jax.Array | None = None,
    *,
    backend: str | None = None,
) -> jax.Array:
    """[T, I] times a matrix that is ``(values * scales + minimums)``: [T, O...] float32.

    ``values`` int8 [I, O...], or uint8 [I/2, O...]: two integers 0..15 in a byte (``nibbles``),
    which stand for -8..7 where there are no ``minimums``. ``scales`` and ``minimums`` [I/G, O...]
    float16 or float32, one for each G inputs of an output. The numbers are those of llama.cpp's
    Q8_0, Q4_0 and Q4_1 (``ggml-quants.c``) with G = 32 and float16. Activations keep their dtype,
    in which the matrix is multiplied; sums are float32.
    Raises ``ValueError`` for shapes and dtypes that do not fit together.
    """
    num_inputs = values.shape[0] * (2 if values.dtype == jnp.uint8 else 1)
    if values.dtype not in (jnp.int8, jnp.uint8):
        raise ValueError(f"values must be int8 or uint8 (two in a byte), got {values.dtype}")
    if inputs.ndim != 2 or inputs.shape[1] != num_inputs:
        raise ValueError(f"rows {inputs.shape[1:]} do not fit a matrix of {num_inputs} inputs")
    num_groups = scales.shape[0]
    if scales.shape[1:] != values.shape[1:] or num_inputs % max(1, num_groups) or not num_groups:
        raise ValueError(f"scales {scales.shape} do not fit a matrix {values.shape}")
    if values.dtype == jnp.uint8 and num_inputs // num_groups % 2:
        raise ValueError(f"groups of {num_inputs // num_groups} do not fill bytes")
    if minimums is not None and minimums.shape != scales.shape:
        raise ValueError(f"minimums {minimums.shape} do not fit scales {scales.shape}")
    return dispatch(
        "grouped_matmul",
        _candidates("grouped_matmul", backend),
        backend,
        inputs,
        values,
        scales,
        minimums,
    )


def kernel_platforms() -> frozenset[str]:
    """Returns the platforms that have a backend of their own: products are kernels there."""
    declared = (module.PLATFORMS for module in IMPLEMENTATIONS.values())
    return frozenset().union(*(platforms for platforms in declared if platforms is not None))


def _candidates(
    operation: str, backend: str | None, **options: Any
) -> dict[str, Callable[..., jax.Array]]:
    """Returns every backend's ``operation``; with none asked for, each where it says it runs."""
    candidates: dict[str, Callable[..., jax.Array]] = {
        name: functools.partial(getattr(module, operation), **options)
        for name, module in IMPLEMENTATIONS.items()
        if hasattr(module, operation)
    }
    if backend is not None:
        return candidates
    # From the last one on: elsewhere than it says, a backend leaves the case to those behind it.
    found: dict[str, Callable[..., jax.Array]] = {}
    for name, candidate in reversed(candidates.items()):
        platforms = IMPLEMENTATIONS[name].PLATFORMS
        if platforms is not None:
            elsewhere = functools.partial(dispatch, operation, found, None)
            candidate = functools.partial(_where_it_runs, platforms, candidate, elsewhere)
        found = {name: candidate} | found
    return found


def _where_it_runs(
    platforms: frozenset[str],
    kernel: Callable[..., jax.Array],
    elsewhere: Callable[..., jax.Array],
    *arrays: Any,
) -> jax.Array:
    """``kernel`` where the program is lowered for one of ``platforms``, else ``elsewhere``.

    A mesh says for what is traced. Without one both are traced, and one of them is lowered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if device is not None and device.platform not in platforms:
        raise NotImplementedError(f"the devices are {device.platform}")
    if any(mesh.shape[name] > 1 for name in set(mesh.axis_names) - set(mesh.manual_axes)):
        raise NotImplementedError("XLA cannot divide a kernel over devices: use shard_map")
    return jax.lax.platform_dependent(
        *arrays, default=elsewhere, **dict.fromkeys(sorted(platforms), kernel)
    )
