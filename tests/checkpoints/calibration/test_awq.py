"""AWQ's factors: what they are for, and where there is nothing to gain."""

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.calibration.awq import input_factors
from tests.jaxinfer.weights.declared import holder, policy_of

RANDOM = np.random.default_rng(0)


def losses(name: str, rows: np.ndarray, matrix: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Mean squared errors of products, with factors and to the nearest, and the factors."""
    weight = holder(matrix.shape, (0,), policy_of(name)).matrix
    factors = np.asarray(input_factors(weight, jnp.asarray(matrix), jnp.asarray(rows)))

    def rounded(matrix: np.ndarray) -> np.ndarray:
        arrays = {n: jnp.asarray(a) for n, a in weight.quantize(matrix).items()}
        return np.asarray(weight.dequantize(arrays))

    scaled = rounded(matrix * factors[:, None]) / factors[:, None]
    errors = [np.square(rows @ (found - matrix)).mean() for found in (scaled, rounded(matrix))]
    return errors[0], errors[1], factors


@pytest.mark.parametrize("name", ["int4", "int4-64", "int4-symmetric-64"])
def test_outliers_of_the_inputs_are_held_more_exactly(name: str) -> None:
    rows = RANDOM.standard_normal((600, 128)).astype(np.float32)
    outliers = [3, 40, 77]
    rows[:, outliers] *= 50
    matrix = RANDOM.standard_normal((128, 32)).astype(np.float32)
    scaled, plain, factors = losses(name, rows, matrix)
    assert scaled < 0.4 * plain
    assert factors[outliers].min() > 3 * np.median(factors)


def test_inputs_of_one_size_are_left_as_they_are() -> None:
    rows = RANDOM.choice([-1, 1], (600, 128)).astype(np.float32)
    matrix = RANDOM.standard_normal((128, 32)).astype(np.float32)
    scaled, plain, factors = losses("int4", rows, matrix)
    assert scaled == plain
    np.testing.assert_array_equal(factors, 1)


def test_inputs_that_are_never_there() -> None:
    scaled, plain, factors = losses(
        "int4", np.zeros((64, 64), np.float32), RANDOM.standard_normal((64, 8)).astype(np.float32)
    )
    assert scaled == plain == 0
    assert np.isfinite(factors).all()
