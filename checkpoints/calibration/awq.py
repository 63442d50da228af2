"""AWQ (Lin et al. 2023): inputs that come large are made small and their weights large, as far as
this makes the error of the rounded product smaller; the factors move into what makes the inputs.
"""

import jax
import jax.numpy as jnp

from jaxinfer.weights import QuantizedWeight

# Powers of the inputs' mean magnitude that are tried; 0 is no change.
_NUM_POWERS = 20
# Rows that the error is looked at for.
_MAX_ROWS = 512


def input_factors(weight: QuantizedWeight, matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """[I]: the factors s for which Q(s W) loses least: |(x / s) Q(s W) - x W|^2 over ``rows``.

    ``matrix`` [I..., O...], ``rows`` [T, I].
    """
    magnitudes = jnp.mean(jnp.abs(rows), axis=0)
    magnitudes = jnp.maximum(magnitudes / jnp.maximum(magnitudes.max(), 1e-30), 1e-4)
    some = rows[:: max(1, len(rows) // _MAX_ROWS)][:_MAX_ROWS]
    values = matrix.reshape(rows.shape[1], -1)
    wanted = some @ values

    @jax.jit
    def try_power(power: jax.Array) -> tuple[jax.Array, jax.Array]:
        factors = magnitudes**power
        factors = factors / jnp.sqrt(factors.max() * factors.min())
        scaled = (values * factors[:, None]).reshape(matrix.shape)
        rounded = weight.dequantize(dict(weight.quantize(scaled))).reshape(values.shape)
        error = (some / factors[None]) @ rounded - wanted
        return jnp.mean(error * error), factors

    tried = [try_power(jnp.float32(n / _NUM_POWERS)) for n in range(_NUM_POWERS)]
    return min(tried, key=lambda result: float(result[0]))[1]
