"""A row of a float product has the same bits however many rows there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import step
from jaxinfer.weights.recorded import float_product
from pallas_kernels.row_blocks import padded_rows
from tests.jaxinfer.tiny import CPU_DTYPES

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("num_rows", "padded"),
    [(1, 4), (3, 4), (8, 10), (12, 12), (16, 16), (32, 34), (48, 48), (49, 60), (264, 264)],
)
def test_how_many_rows(num_rows: int, padded: int) -> None:
    assert padded_rows(num_rows) == padded


def test_nothing_is_left_over() -> None:
    """Looks at a part of 48, or two halves of the rest: blocks of 6, or of 6 and one of 4."""
    for num_rows in range(1, 600):
        padded = padded_rows(num_rows)
        assert num_rows <= padded <= num_rows + 11
        rest = padded % 48 + 48 * (padded > 48)
        parts = [rest] if padded <= 48 else [rest // 2, rest - rest // 2]
        assert all(part % 6 in (0, 4) for part in parts)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (576, 1536)])
def test_every_row_has_the_bits_that_it_has_among_others(inputs: int, outputs: int) -> None:
    """From 8 rows on, as a step has them: fewer take kernels of their own."""
    matrix = jnp.asarray(RANDOM.standard_normal((inputs, outputs)), jnp.float32)
    rows = jnp.asarray(RANDOM.standard_normal((264, inputs)), jnp.float32)
    options = step.compiler_options("cpu", CPU_DTYPES)

    def product(rows: jax.Array) -> np.ndarray:
        lowered = jax.jit(float_product).lower(rows, matrix)
        return np.asarray(lowered.compile(compiler_options=options)(rows, matrix))

    whole = product(rows)
    for num_rows in (*range(8, 34), 40, 50, 62, 64, 65, 75, 80, 90, 99, 129, 200, 257):
        np.testing.assert_array_equal(product(rows[:num_rows]), whole[:num_rows], str(num_rows))
