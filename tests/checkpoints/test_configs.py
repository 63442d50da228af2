"""Shipped configurations: their figures against published sizes, and against the default model."""

import dataclasses
import math

import pytest

from checkpoints.configs import configured_models, model_config
from checkpoints.fetch.catalog import resolve
from checkpoints.load import open_checkpoint
from jaxinfer.models import parameter_shapes

# Parameters as each model's card gives them, in billions, rounded as there.
PUBLISHED = {
    "llama-3-8b": "8.03",
    "llama-3-70b": "70.55",
    "llama-3.2-1b": "1.24",
    "qwen2.5-coder-1.5b": "1.54",
    "qwen3-30b-a3b": "30.53",
    "smollm2-135m-instruct": "0.13",
}


def test_every_configuration_has_a_published_size() -> None:
    assert configured_models() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_number_of_parameters(name: str) -> None:
    model = model_config(name)
    count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    assert f"{count / 1e9:.2f}" == PUBLISHED[name]


@pytest.mark.model
def test_the_default_model_is_as_its_checkpoint_says() -> None:
    name = "smollm2-135m-instruct"
    ours, found = model_config(name), open_checkpoint(resolve(name)).model
    assert found.rms_norm_eps == pytest.approx(ours.rms_norm_eps, rel=1e-6)  # float32 there
    assert dataclasses.replace(found, rms_norm_eps=ours.rms_norm_eps) == ours


@pytest.mark.parametrize("name", ["", "llama-3-9b", "../configs/llama-3-8b", "__init__"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"no configuration is called .*; there are llama-3-70b"):
        model_config(name)
