"""Rows of float products on XLA:CPU, padded so that no row's bits depend on how many there are.

XLA:CPU multiplies floats by oneDNN's sgemm, which takes rows in blocks: of 6 with AVX2 and AVX (its
``jit_avx_gemm_f32``), of 8 with AVX-512. What is left over, one to three rows of 6, is summed by
another kernel in another order; with AVX-512 it is not. More than 48 rows are divided into parts of
48 and two halves of the rest, where the same holds for each part.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Of one part; what is left of 6 may be 4.
_BLOCK, _MOST_OF_A_PART = 6, 48


def padded_rows(num_rows: int) -> int:
    """Returns the least number of rows, ``num_rows`` or more, of which none is left over."""
    if num_rows > _MOST_OF_A_PART:
        return -(-num_rows // (2 * _BLOCK)) * (2 * _BLOCK)
    return next(n for n in range(max(4, num_rows), _MOST_OF_A_PART + 1) if n % _BLOCK in (0, 4))


def with_no_rows_left_over(product: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    """Returns the ``product`` of ``rows`` [N, ...], computed with padding behind them: [N, ...]."""
    num_rows = rows.shape[0]
    padding = padded_rows(num_rows) - num_rows
    padded = jnp.pad(rows, ((0, padding), *((0, 0),) * (rows.ndim - 1)))
    return product(padded)[:num_rows]
