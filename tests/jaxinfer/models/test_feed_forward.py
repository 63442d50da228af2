"""Products of groups of rows, each with weights of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.models.feed_forward import grouped_product

RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.standard_normal((5, 48, 32)).astype(np.float32)
ROWS = RANDOM.standard_normal((40, 48)).astype(np.float32)
PRODUCT = jax.jit(grouped_product)


@given(st.lists(st.integers(0, 20), min_size=5, max_size=5).filter(lambda s: sum(s) <= len(ROWS)))
def test_each_group_has_its_weights(sizes: list[int]) -> None:
    products = PRODUCT(ROWS, WEIGHTS, np.array(sizes, np.int32))
    first = 0
    for size, weights in zip(sizes, WEIGHTS, strict=True):
        group = slice(first, first + size)
        np.testing.assert_allclose(products[group], ROWS[group] @ weights, rtol=1e-5, atol=1e-5)
        first += size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_has_the_same_bits_wherever_it_stands(dtype: jnp.dtype) -> None:
    weights = jnp.asarray(WEIGHTS, dtype)

    def row(position: int, sizes: list[int]) -> jax.Array:
        rows = RANDOM.standard_normal(ROWS.shape).astype(np.float32)
        rows[position] = ROWS[0]
        found = PRODUCT(jnp.asarray(rows, dtype), weights, np.array(sizes, np.int32))
        return found[position]

    alone = row(0, [0, 1, 0, 0, 0])
    assert alone.dtype == jnp.float32
    for position in range(40):
        np.testing.assert_array_equal(row(position, [0, 40, 0, 0, 0]), alone)
        if position < 30:
            np.testing.assert_array_equal(row(5 + position, [5, 32, 1, 2, 0]), alone)
