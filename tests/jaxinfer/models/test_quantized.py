"""Every family with matrices in 8 bits."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from checkpoints.load import load_parameters
from jaxinfer import models
from jaxinfer.config import DtypePolicy
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.models import quantized_weights
from jaxinfer.request import Request
from jaxinfer.sharding import abstract_parameters, make_mesh
from tests.conftest import ManyDevices
from tests.data.random_family import draw_prompt
from tests.jaxinfer.logits import prompt_logits
from tests.jaxinfer.models.random_checkpoint import RandomCheckpoint
from tests.jaxinfer.models.test_families import ONE_OF_EACH, SUBJECT
from tests.jaxinfer.tiny import CPU_DTYPES, run_all, tiny_config
from tests.thorough import thorough_beyond


def policy(quantization: str | None) -> DtypePolicy:
    """Float32 but for the matrices."""
    return dataclasses.replace(CPU_DTYPES, quantization=quantization)


@functools.cache
def parameters_of(case: str, quantization: str | None) -> dict[Any, Any]:
    """Loads the parameters for one device."""
    checkpoint, dtypes = RandomCheckpoint(case), policy(quantization)
    _, state = models.abstract(checkpoint.model, dtypes)
    abstract = abstract_parameters(state, make_mesh(jax.devices("cpu")[:1]))
    return load_parameters(
        checkpoint, abstract, quantized=quantized_weights(checkpoint.model, dtypes)
    )


def dequantize(tree: Any, path: tuple[Any, ...], made: Any) -> Any:
    """``tree`` with the numbers that its quantized matrices stand for."""
    if path in made:
        return made[path].dequantize(tree)
    if isinstance(tree, dict):
        return {key: dequantize(value, (*path, key), made) for key, value in tree.items()}
    return tree


def tokens_of(case: str, quantization: str, num_devices: int) -> list[int]:
    """Returns an engine's continuation of the prompt."""
    checkpoint, dtypes = RandomCheckpoint(case), policy(quantization)
    mesh = make_mesh(jax.devices()[:num_devices])
    engine = Engine(EngineSpec(checkpoint.model, tiny_config(), dtypes, mesh))
    engine.compile(shapes=engine.shapes[-1:])  # one is enough, and takes less time
    made = quantized_weights(checkpoint.model, dtypes, mesh)
    engine.start(
        load_parameters(
            checkpoint, engine.abstract_parameters, num_devices=num_devices, quantized=made
        )
    )
    request = Request("a", tuple(draw_prompt(case)), 24, ignore_eos=True)
    return run_all(engine, [request])["a"]


@pytest.mark.parametrize(
    ("case", "quantization"),
    thorough_beyond(
        [("qwen2", "int8")],
        [(case, "int8") for case in ONE_OF_EACH]
        + [("qwen2", "int4"), ("qwen3_moe", "int4-symmetric"), ("gemma3", "int4-64")],
        SUBJECT,
    ),
)
def test_logits_are_those_of_the_dequantized_matrices(case: str, quantization: str) -> None:
    """With 16-bit activations nothing but the matrices is rounded."""
    model, quantized = RandomCheckpoint(case).model, parameters_of(case, quantization)
    plain, made = parameters_of(case, None), quantized_weights(model, policy(quantization))
    dequantized = dequantize(quantized, (), made)
    prompt, config = draw_prompt(case), tiny_config()
    found = prompt_logits(model, quantized, prompt, config, dtypes=policy(quantization))
    wanted = prompt_logits(model, dequantized, prompt, config)
    # Of groups the floats are multiplied that the integers stand for.
    rounding = 2e-3 if quantization == "int8" else 1e-6
    assert np.abs(found - wanted).max() <= rounding * np.abs(wanted).max()
    exact = prompt_logits(model, plain, prompt, config)
    assert np.abs(wanted - exact).max() > 1e-3 * np.abs(exact).max(), "nothing was quantized"


@pytest.mark.parametrize(
    ("case", "quantization"),
    thorough_beyond(
        [],
        [("qwen2", "int8-dynamic"), ("qwen3_moe", "int8"), ("qwen3_moe", "int4")],
        SUBJECT,
    ),
)
def test_eight_devices_give_the_tokens_of_one(
    many_devices: ManyDevices, case: str, quantization: str
) -> None:
    one = tokens_of(case, quantization, 1)
    assert many_devices(tokens_of, case, quantization, 8) == one


def test_a_quarter_of_the_bytes() -> None:
    """Matrices shrink so; norms and the router stay as they are."""
    plain, quantized = parameters_of("qwen2", None), parameters_of("qwen2", "int8")
    matrices = [leaf for leaf in jax.tree.leaves(plain) if leaf.ndim > 1]
    small = [
        leaf
        for leaf in jax.tree.leaves(
            quantized, is_leaf=lambda x: isinstance(x, dict) and "values" in x
        )
        if isinstance(leaf, dict)
    ]
    ratio = sum(leaf.nbytes for leaf in jax.tree.leaves(small)) / sum(m.nbytes for m in matrices)
    assert 0.25 < ratio < 0.32  # of matrices this small, scales are a part
