"""Lengths that are served where nobody says one."""

import dataclasses

import pytest

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer_entrypoints.loading.sizes import default_max_model_len, describe_context
from tests.jaxinfer.tiny import tiny_model


def model_with(context: int, original: int | None = None) -> ModelConfig:
    """A model of so long a context, with longrope beyond the ``original`` one."""
    model = dataclasses.replace(tiny_model(), max_position_embeddings=context)
    factors = (1.0,) * (model.head_dim // 2)
    scaling = None
    if original is not None:
        scaling = RopeScaling(
            "longrope",
            factors=factors,
            short_factors=factors,
            original_max_position_embeddings=original,
        )
    return dataclasses.replace(model, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("context", "original", "expected"),
    [
        (2048, None, 2048),
        (131072, None, 8192),
        (131072, 4096, 4096),
        (131072, 16384, 8192),
        (4096, 4096, 4096),
    ],
)
def test_default_lengths(context: int, original: int | None, expected: int) -> None:
    assert default_max_model_len(model_with(context, original)) == expected


def test_what_is_said_of_factors() -> None:
    model = model_with(131072, 4096)
    said = describe_context(model, 4096)
    assert "short factors" in said
    assert "(up to 131072)" in said
    assert "is more than 4096: the long factors" in describe_context(model, 4097)
    assert describe_context(model_with(4096, 4096), 4096) == ""
    assert describe_context(model_with(4096), 4096) == ""
