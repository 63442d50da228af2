"""Keys and values in one byte: integers or float8, with a scale for each token in each head.

The scale is that of the largest number of a row (Hooper et al. 2024, KVQuant, have it per token for
values; per channel for keys would have to know tokens that are yet to come). Float8 (e4m3) values
are kept as uint8, which every backend can move.
"""

import jax
import jax.numpy as jnp

# Storage type of quantized values -> the largest one.
LARGEST = {"int8": 127.0, "uint8": float(jnp.finfo(jnp.float8_e4m3fn).max)}


def is_quantized(dtype: jax.typing.DTypeLike) -> bool:
    """Tells if pages of ``dtype`` have scales."""
    return jnp.dtype(dtype).name in LARGEST


def as_floats(rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Reads what is stored, without its scale, in a float ``dtype`` that holds it exactly."""
    if rows.dtype == jnp.uint8:
        rows = jax.lax.bitcast_convert_type(rows, jnp.float8_e4m3fn)
    return rows.astype(dtype)


def quantize_rows(rows: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """[..., D] -> values of ``dtype`` and float32 scales [...], the largest of a row as LARGEST."""
    largest = LARGEST[jnp.dtype(dtype).name]
    wide = rows.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / largest
    scaled = wide / jnp.where(scales == 0, 1, scales)[..., None]
    scaled = jnp.clip(scaled, -largest, largest)
    if jnp.dtype(dtype) == jnp.int8:
        return jnp.round(scaled).astype(jnp.int8), scales
    small = scaled.astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(small, jnp.uint8), scales


def dequantize_rows(rows: jax.Array, scales: jax.Array) -> jax.Array:
    """The inverse of ``quantize_rows``, float32."""
    return as_floats(rows, jnp.float32) * scales[..., None]
