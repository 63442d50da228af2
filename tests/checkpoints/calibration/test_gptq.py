"""GPTQ against its paper's equations in numpy, and what it is for."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.calibration.gptq import gptq
from jaxinfer.weights.rounding import nearest, numbers, steps_of_groups
from tests.jaxinfer.weights.declared import holder, policy_of
from tests.thorough import thorough_beyond

RANDOM = np.random.default_rng(0)
SHAPES = [((64, 5), (0,)), ((96, 2, 3, 8), (0,)), ((2, 3, 32, 20), (0, 1, 2))]
NAMES = ["int4", "int4-64", "int4-symmetric"]


def correlated_rows(num_inputs: int, num_rows: int = 400) -> np.ndarray:
    mix = RANDOM.standard_normal((num_inputs, num_inputs)) / num_inputs**0.5
    sizes = 10.0 ** RANDOM.uniform(-1, 1, num_inputs)
    return (RANDOM.standard_normal((num_rows, num_inputs)) @ mix * sizes).astype(np.float32)


def declared(shape: tuple[int, ...], inputs: tuple[int, ...], name: str) -> Any:
    return holder(shape, inputs, policy_of(name)).matrix


def values_of(weight: Any, arrays: Any) -> np.ndarray:
    """[I, O], what ``arrays`` stand for."""
    found = weight.dequantize({name: jnp.asarray(array) for name, array in arrays.items()})
    return np.asarray(found).reshape(weight.num_inputs, -1)


def as_in_the_paper(weight: Any, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[I, O] float32: equations 2 and 3, the inverse updated after every input."""
    values, rows = values.astype(np.float64), rows.astype(np.float64)
    moments = rows.T @ rows
    moments += 0.01 * np.mean(np.diag(moments)) * np.eye(len(moments))
    inverse, rounded, group = np.linalg.inv(moments), np.zeros_like(values), weight.form.group
    scales: Any = None
    minimums: Any = None
    for i in range(len(values)):
        if i % group == 0:
            members = values[i : i + group].astype(np.float32)
            scales, minimums = steps_of_groups(members, weight.form, 0)
        row = values[i : i + 1].astype(np.float32)
        rounded[i] = numbers(nearest(row, scales, minimums, weight.form), scales, minimums)
        error = (values[i] - rounded[i]) / inverse[i, i]
        values -= np.outer(inverse[:, i], error)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return rounded.astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "inputs"), thorough_beyond(SHAPES[:1], SHAPES, "calibration of more shapes")
)
def test_numbers_are_those_of_the_equations(
    shape: tuple[int, ...], inputs: tuple[int, ...], name: str
) -> None:
    weight = declared(shape, inputs, name)
    matrix = RANDOM.standard_normal(shape).astype(np.float32)
    values = matrix.reshape(weight.num_inputs, -1)
    rows = correlated_rows(weight.num_inputs)
    found = values_of(weight, gptq(weight, jnp.asarray(matrix), jnp.asarray(rows)))
    expected = as_in_the_paper(weight, values, rows)
    # Where the last bit of a float decides about an integer, what comes after differs too.
    assert np.mean(np.abs(found - expected) > 1e-3) < 0.02
    losses = [np.square(rows @ (x - values)).mean() for x in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    plain = values_of(weight, weight.quantize(matrix))
    assert losses[0] < 0.85 * np.square(rows @ (plain - values)).mean()


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest() -> None:
    weight, matrix = declared((64, 5), (0,), "int4"), RANDOM.standard_normal((64, 5))
    arrays = gptq(weight, jnp.asarray(matrix, jnp.float32), jnp.eye(64))
    expected = weight.quantize(matrix.astype(np.float32))
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(arrays[name]), array)


@pytest.mark.parametrize("rows", [np.zeros((9, 64)), np.eye(64)[:3], 1e12 * np.ones((9, 64))])
def test_rows_that_say_little_do_no_harm(rows: np.ndarray) -> None:
    """Inputs that are never there, fewer rows than inputs, all rows alike."""
    weight = declared((64, 5), (0,), "int4")
    matrix = RANDOM.standard_normal((64, 5)).astype(np.float32)
    arrays = gptq(weight, jnp.asarray(matrix), jnp.asarray(rows, jnp.float32))
    found, plain = values_of(weight, arrays), values_of(weight, weight.quantize(matrix))
    assert np.isfinite(found).all()
    assert np.square(found - matrix).mean() < 30 * np.square(plain - matrix).mean()


def test_rows_that_are_not_finite_are_refused() -> None:
    weight, rows = declared((64, 5), (0,), "int4"), np.ones((9, 64), np.float32)
    rows[3, 5] = np.inf
    with pytest.raises(ValueError, match="no finite second moments"):
        gptq(weight, jnp.zeros((64, 5)), jnp.asarray(rows))
