"""Every backend of the 8-bit product against its definition, and what its shapes may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import int8_matmul
from pallas_kernels.quantized_matmul.xla import _with_floats

# Rows, inputs, outputs: one axis or several, one row (a case of its own on CPU), odd sizes.
CASES = [
    (1, (64,), (48,)),
    (2, (64,), (2, 3, 16)),
    (8, (3, 2, 16), (40,)),
    (33, (7,), (5,)),
    (64, (576,), (1536,)),
]
BACKENDS = ["xla"]  # for the TPU's kernels see test_tpu_matmul.py


def draw(rows: int, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Rows of very different sizes, one of them zeros, and one output of zeros."""
    random = np.random.default_rng(rows)
    x = random.standard_normal((rows, *inputs)) * 10.0 ** random.integers(
        -6, 6, (rows, *[1] * len(inputs))
    )
    x[rows // 2] *= rows > 2
    values = random.integers(-127, 128, (*outputs, *inputs)).astype(np.int8)
    scales = random.random(outputs)
    scales.flat[0] = 0
    return jnp.asarray(x, jnp.float32), jnp.asarray(values), jnp.asarray(scales, jnp.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), CASES)
def test_equals_the_definition(
    rows: int, inputs: tuple[int, ...], outputs: tuple[int, ...], bits: int, backend: str
) -> None:
    x, values, scales = draw(rows, inputs, outputs)
    found = jax.jit(int8_matmul, static_argnames=("activation_bits", "backend"))(
        x, values, scales, activation_bits=bits, backend=backend
    )
    wanted = int8_matmul(x, values, scales, activation_bits=bits, backend="reference")
    assert found.dtype == jnp.float32
    assert found.shape == wanted.shape == (rows, *outputs)
    # Half a step of every input, were all of them off in the worst direction; and float32's own.
    sums = np.abs(np.asarray(values * scales.reshape(*outputs, *[1] * len(inputs)))).reshape(
        *outputs, -1
    )
    largest = np.abs(np.asarray(x)).reshape(rows, -1).max(axis=1).reshape(rows, *[1] * len(outputs))
    step = {8: 1e-6, 16: 0.5 / 16256 + 1e-6}[bits]
    assert (np.abs(found - wanted) <= step * largest * sums.sum(axis=-1)[None] + 1e-30).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_row_has_the_same_bits_in_every_batch(bits: int) -> None:
    x, values, scales = draw(64, (576,), (96,))
    product = jax.jit(int8_matmul, static_argnames="activation_bits")
    whole = product(x, values, scales, activation_bits=bits)
    for rows in (1, 2, 3, 8, 31):
        part = product(x[:rows], values, scales, activation_bits=bits)
        np.testing.assert_array_equal(part, whole[:rows])


def test_16_bits_are_exact_where_the_row_is_of_integers() -> None:
    """Rows whose largest number is what the planes can hold lose nothing."""
    random = np.random.default_rng(0)
    x = random.integers(-16256, 16257, (5, 64)).astype(np.float32)
    x[:, 0] = 16256
    values = random.integers(-127, 128, (32, 64)).astype(np.int8)
    found = int8_matmul(
        jnp.asarray(x), jnp.asarray(values), jnp.ones(32, jnp.float32), activation_bits=16
    )
    exact = x.astype(np.int64) @ values.T.astype(np.int64)
    np.testing.assert_allclose(found, exact, rtol=2e-7, atol=4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_integers_as_floats(dtype: jnp.dtype) -> None:
    """Accelerators take this for 16 bits: int8 values are exact in both dtypes."""
    x, values, scales = draw(8, (64,), (48,))
    rows = jnp.asarray(x, dtype)
    found = _with_floats(rows, values, scales)
    wanted = int8_matmul(
        rows.astype(jnp.float32), values, scales, activation_bits=16, backend="reference"
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("inputs", "values", "scales", "bits", "message"),
    [
        ((2, 8), (4, 9), (4,), 8, r"rows \(8,\) do not fit a matrix \(4, 9\)"),
        ((2, 8), (4, 8), (8,), 8, r"scales \(8,\) do not fit a matrix \(4, 8\)"),
        ((2, 8), (4, 8), (4,), 4, "activation_bits must be 8 or 16, got 4"),
    ],
)
def test_what_does_not_fit(
    inputs: tuple[int, ...],
    values: tuple[int, ...],
    scales: tuple[int, ...],
    bits: int,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        int8_matmul(
            jnp.zeros(inputs), jnp.zeros(values, jnp.int8), jnp.zeros(scales), activation_bits=bits
        )
