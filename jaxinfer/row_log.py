"""The logarithm of one number a row, with the same bits however many rows there are."""

import jax
import jax.numpy as jnp

WHOLE_VECTORS = 16  # a multiple of every vector width of float32


def row_log(x: jax.Array) -> jax.Array:
    """[R] float32 natural logarithms of ``x`` [R].

    In whole vectors: XLA:CPU computes 5, 6, 7 or 15 logarithms in another way than 8 or 16 (found
    with jax 0.11.2), and the last bit of some differs. The barriers keep the padding from being
    moved behind the logarithm, and the logarithm from being fused with what uses it.
    """
    missing = -x.shape[0] % WHOLE_VECTORS
    padded = jax.lax.optimization_barrier(jnp.pad(x, (0, missing), constant_values=1.0))
    return jax.lax.optimization_barrier(jnp.log(padded))[: x.shape[0]]
