"""Rotary position embedding (Su et al. 2021) and the rules that stretch it beyond its context.

Axis letters: T rows, H heads, D head dim, D' rotated dimensions.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig, RopeScaling

RopeTables = tuple[jax.Array, jax.Array]


def rope_tables(positions: jax.Array, model: ModelConfig, is_local: bool = False) -> RopeTables:
    """cos and sin [T, 1, D'/2] float32 of the rotary angles at ``positions`` [T].

    ``is_local``: those of layers with a window, where they have their own.
    """
    frequencies, factor = inverse_frequencies(model, is_local)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles)[:, None, :] * factor, jnp.sin(angles)[:, None, :] * factor


def apply_rope(heads: jax.Array, tables: RopeTables) -> jax.Array:
    """Rotates [T, H, D] by halves: dimension i is paired with i + D'/2, as in Hugging Face.

    Dimensions from D' on stay as they are.
    """
    cos, sin = tables
    half = cos.shape[-1]
    x = heads.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if rest.shape[-1]:
        rotated.append(rest)
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)


def inverse_frequencies(model: ModelConfig, is_local: bool = False) -> tuple[np.ndarray, float]:
    """[D'/2] float32, theta^(-2i/D') stretched by the model's rule; and the attention factor."""
    dim = model.head_dim if model.rotary_dim is None else model.rotary_dim
    theta, scaling = model.rope_theta, model.rope_scaling
    if is_local and model.local_rope_theta is not None:
        theta, scaling = model.local_rope_theta, None
    frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return frequencies.astype(np.float32), 1.0
    match scaling.kind:
        case "linear":
            frequencies = frequencies / scaling.factor
        case "factors":
            frequencies = frequencies / np.asarray(scaling.factors)
        case "longrope":
            is_short = model.max_position_embeddings <= scaling.original_max_position_embeddings
            factors = scaling.short_factors if is_short else scaling.factors
            frequencies = frequencies / np.asarray(factors)
        case "llama3":
            frequencies = _llama3(frequencies, scaling)
        case "yarn":
            frequencies = _yarn(frequencies, scaling, theta)
    return frequencies.astype(np.float32), scaling.attention_factor


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Wavelengths beyond the trained context are stretched, short ones kept, with a linear passage
    between the two (Grattafiori et al. 2024).
    """
    wavelengths = 2 * np.pi / frequencies
    rotations = scaling.original_max_position_embeddings / wavelengths
    smooth = (rotations - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    """The same idea, the passage linear in the index between ``beta_slow`` and ``beta_fast``
    rotations over the trained context (Peng et al. 2023, equations 17 to 23).
    """
    dim = 2 * len(frequencies)

    def index(rotations: float) -> float:
        wavelength = scaling.original_max_position_embeddings / rotations
        return dim * np.log(wavelength / (2 * np.pi)) / (2 * np.log(theta))

    low = max(np.floor(index(scaling.beta_fast)), 0)
    high = min(np.ceil(index(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequencies * (1 - ramp) + frequencies / scaling.factor * ramp
