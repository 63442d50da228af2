"""The rotation that a GGUF file asks for, as the fields that a ``config.json`` would have."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from checkpoints.gguf.blocks import dequantize_rows
from checkpoints.gguf.settings import Settings
from checkpoints.gguf.split import GGUFFiles
from jaxinfer.config import ModelConfig, RopeScaling

# Tensors with divisors of rotary frequencies: part of the configuration, not of the parameters.
ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
ROPE_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)

_SCALING = "rope.scaling."
_ATTENTION_FACTOR = _SCALING + "attn_factor"


def rope_fields(file: GGUFFiles, settings: Settings, context: int) -> Iterator[tuple[str, Any]]:
    """Base, original context and scaling. Raises ``ValueError`` for what is not computed here.

    ``context``: the length that the file says. The attention factor: see ``with_attention_factor``.
    """
    yield "rope_theta", settings.get("rope.freq_base", float, 10000.0)
    original = settings.get(_SCALING + "original_context_length", int, 0)
    yield "original_max_position_embeddings", original or context
    yield "rope_scaling", _scaling(file, settings, original)


def with_attention_factor(model: ModelConfig, settings: Settings) -> ModelConfig:
    """The model with cosines and sines multiplied by what the file has on top of its rule's own.

    llama.cpp does so whatever the rule, a ``config.json`` cannot say it of all.
    """
    factor = settings.get(_ATTENTION_FACTOR, float, 1.0)
    if factor == 1:
        return model
    if factor <= 0:
        raise ValueError(f"{settings.key(_ATTENTION_FACTOR)} must be positive, got {factor:g}")
    if model.local_rope_theta is not None:
        raise ValueError(
            f"{settings.key(_ATTENTION_FACTOR)} is {factor:g}; only 1 is supported where local "
            "layers have a rotation of their own"
        )
    scaling = model.rope_scaling or RopeScaling("linear")
    scaling = dataclasses.replace(scaling, attention_factor=scaling.attention_factor * factor)
    return dataclasses.replace(model, rope_scaling=scaling)


def _scaling(file: GGUFFiles, settings: Settings, original: int) -> dict[str, Any] | None:
    kind = settings.get(_SCALING + "type", str, "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ValueError(
            f"{settings.key(_SCALING)}type is {kind!r:.40}; supported are none, linear, yarn and "
            "longrope"
        )
    factor = _factor(settings) if kind != "none" else 1.0
    settings.ignore(_SCALING + "factor", "rope.scale_linear")
    yarn = _yarn(settings, kind == "yarn")
    if kind == "longrope" or LONG_FACTORS in file.tensors:
        _refuse_second(file, settings, factor, LONG_FACTORS)
        return {
            "rope_type": "longrope",
            "long_factor": _factors(file, LONG_FACTORS),
            "short_factor": _factors(file, SHORT_FACTORS),
            "attention_factor": 1.0,
        }
    if ROPE_FACTORS in file.tensors:
        _refuse_second(file, settings, factor, ROPE_FACTORS)
        return {"rope_type": "factors", "factors": _factors(file, ROPE_FACTORS)}
    if factor == 1:
        return None
    if kind == "yarn" and not original:
        key = settings.key(_SCALING + "original_context_length")
        raise ValueError(f"metadata key {key!r} is missing")
    return {"rope_type": kind, "factor": factor, **yarn}


def _factor(settings: Settings) -> float:
    """The divisor of frequencies, under the key of today or of old; 0 is none to llama.cpp."""
    name, old = _SCALING + "factor", "rope.scale_linear"
    factor = settings.get(name if settings.has(name) else old, float, 1.0)
    if settings.has(name):
        settings.expect(old, float, factor, 0.0)
    if factor < 0:
        raise ValueError(f"{settings.key(name)} must be positive, got {factor}")
    return factor or 1.0


def _yarn(settings: Settings, is_yarn: bool) -> dict[str, Any]:
    """Settings of yarn alone; without it nothing follows from them."""
    betas = {name: f"{_SCALING}yarn_{name}" for name in ("beta_fast", "beta_slow")}
    settings.ignore(*betas.values())
    # The part of the rule in what is computed; -1 is not set.
    settings.expect(_SCALING + "yarn_ext_factor", float, -1.0, 1.0 if is_yarn else 0.0)
    if not is_yarn:
        return {}
    return {name: settings.get(key, float) for name, key in betas.items() if settings.has(key)}


def _refuse_second(file: GGUFFiles, settings: Settings, factor: float, name: str) -> None:
    """Refuses a second rule beside that of the tensor ``name``."""
    if factor != 1:
        raise ValueError(f"both {settings.key(_SCALING)}factor and {name}; one is supported")
    others = {ROPE_FACTORS, LONG_FACTORS} - {name}
    for other in others & file.tensors.keys():
        raise ValueError(f"both tensors {other!r} and {name!r}; one is supported")


def _factors(file: GGUFFiles, name: str) -> list[float]:
    if name not in file.tensors:
        raise ValueError(f"tensor {name!r} is missing")
    factors = dequantize_rows(file.tensor_bytes(name), file.tensors[name].type).reshape(-1)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ValueError(f"{name} must hold positive, finite numbers")
    return factors.tolist()
