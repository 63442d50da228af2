"""Whole models rounded with a text in view: every family, its parts, and what it brings."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints import calibration
from checkpoints.calibration import Calibration, Method, calibrate
from checkpoints.parameters import assemble
from jaxinfer import models
from jaxinfer.models import declared_parameters, quantized_weights
from jaxinfer.weights import MatrixPath
from tests.jaxinfer.logits import prompt_logits
from tests.jaxinfer.models.random_checkpoint import RandomCheckpoint
from tests.jaxinfer.models.test_families import ONE_OF_EACH, SUBJECT
from tests.jaxinfer.tiny import random_parameters, tiny_config, tiny_model
from tests.jaxinfer.weights.declared import PLAIN, policy_of
from tests.thorough import thorough_beyond


def parameters_of(case: str) -> tuple[Any, dict[MatrixPath, np.ndarray]]:
    """A model and its parameters in float32, by their paths."""
    checkpoint = RandomCheckpoint(case)
    model = checkpoint.model
    return model, {
        path: assemble(path, declared, np.dtype(np.float32), checkpoint.tensor)
        for path, declared in declared_parameters(model).items()
    }


@functools.cache
def calibrated(case: str, method: Method) -> dict[MatrixPath, Any]:
    """All parameters of a random model, and what they stand for."""
    model, parameters = parameters_of(case)
    text = np.random.default_rng(0).integers(0, model.vocab_size, 1024)
    quantized = quantized_weights(model, policy_of("int4"))
    return calibrate(model, parameters, quantized, Calibration(method, tuple(text)))


@pytest.mark.parametrize("case", thorough_beyond([], ["qwen2", "gemma3", "qwen3_moe"], SUBJECT))
def test_every_family_is_rounded_whole(case: str) -> None:
    """Arrays of the formats' own shapes, no parameter lost, numbers near what they were."""
    model, parameters = parameters_of(case)
    quantized = quantized_weights(model, policy_of("int4"))
    made = calibrated(case, "gptq")
    assert made.keys() == parameters.keys()
    for path, parameter in parameters.items():
        if path not in quantized:
            np.testing.assert_array_equal(made[path], parameter)
            continue
        plain = quantized[path].quantize(parameter)
        assert {n: (a.shape, a.dtype) for n, a in made[path].items()} == {
            n: (a.shape, a.dtype) for n, a in plain.items()
        }
        is_seen = "experts" not in str(path[-1]) and path != ("embed_tokens",)
        changed = np.mean(made[path]["values"] != plain["values"])
        assert (0.02 < changed < 0.9) if is_seen else changed == 0, path


@pytest.mark.parametrize(
    ("method", "most"),
    thorough_beyond([("awq", 0.9)], [("gptq", 0.8), ("awq", 0.9), ("awq-gptq", 0.8)], SUBJECT),
)
def test_the_model_stays_nearer_to_what_it_was(method: Method, most: float) -> None:
    """Makes inputs of a model that have a few directions in common, and some are large."""
    model, random = tiny_model(hidden_size=64), np.random.default_rng(2)
    parameters = calibration._flat(jax.tree.map(np.asarray, random_parameters(model)))
    directions = random.standard_normal((96, 8)) @ random.standard_normal((8, 64))
    noise = 0.1 * random.standard_normal((96, 64))
    large = np.where(np.arange(64) % 16 == 3, 8, 1)
    parameters[("embed_tokens",)] = ((directions + noise) * large).astype(np.float32)
    quantized = quantized_weights(model, policy_of("int4"))
    text = tuple(random.integers(0, 96, 2048))
    made = calibrate(model, parameters, quantized, Calibration(method, text))
    plain = {p: quantized[p].quantize(v) if p in quantized else v for p, v in parameters.items()}

    def logits(made: Mapping[MatrixPath, Any]) -> np.ndarray:
        floats = {
            path: quantized[path].dequantize({n: jnp.asarray(a) for n, a in value.items()})
            if isinstance(value, Mapping)
            else value
            for path, value in made.items()
        }
        prompt = np.random.default_rng(3).integers(0, 96, 100).tolist()
        return prompt_logits(model, calibration._nested(floats), prompt, tiny_config())

    exact = logits(parameters)
    errors = [np.square(logits(rounded) - exact).mean() for rounded in (made, plain)]
    assert errors[0] < most * errors[1]


@pytest.mark.parametrize("case", thorough_beyond(["qwen2"], ONE_OF_EACH, SUBJECT))
def test_factors_change_no_result(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor that a matrix's inputs are divided by is in the matrix, for any factors."""
    random = np.random.default_rng(1)

    def factors(weight: Any, matrix: Any, rows: Any) -> Any:
        return jnp.asarray(random.uniform(0.25, 4, rows.shape[1]), jnp.float32)

    monkeypatch.setattr(calibration, "input_factors", factors)
    model, parameters = parameters_of(case)
    graph, _ = models.abstract(model, PLAIN)
    decoder = nnx.merge(graph, calibration._nested(parameters))
    batch = calibration._batch(1, 64)
    shape = (64, model.hidden_size)
    x = jnp.asarray(random.standard_normal(shape), jnp.float32)
    pages = calibration.abstract_kv_pages(
        "cpu", batch.page_table.size, 16, model.num_key_value_heads, model.head_dim, jnp.float32
    )
    inputs = (x, decoder.ropes(batch.positions())[0], pages, batch)
    layer = decoder.layers[0]
    layer_graph, state = nnx.split(layer)
    before, rows = calibration._run(layer_graph, state, *inputs)
    scaled = {
        path: jnp.asarray(a) for path, a in calibration._flat(nnx.to_pure_dict(state)).items()
    }
    changed = dict(scaled)
    undeclared: Any = dict.fromkeys(scaled)
    calibration._scale_inputs(layer.norms, undeclared, changed, dict(rows))
    after, _ = calibration._run(layer_graph, calibration._nested(changed), *inputs)
    np.testing.assert_allclose(np.asarray(after), np.asarray(before), rtol=2e-4, atol=2e-4)
    num_changed = sum(bool(jnp.any(changed[path] != scaled[path])) for path in scaled)
    assert num_changed == (2 if model.num_experts else 5)


def test_what_cannot_be_calibrated_is_said() -> None:
    model, parameters = parameters_of("qwen2")

    def call(name: str, num_tokens: int) -> Any:
        quantized = quantized_weights(model, policy_of(name))
        return calibrate(model, parameters, quantized, Calibration("gptq", (1,) * num_tokens))

    with pytest.raises(ValueError, match="calibration is for matrices of 4 bits: int4, int4-64"):
        call("int8", 300)
    with pytest.raises(ValueError, match="has 63 tokens, at least 64 are needed"):
        call("int4", 63)
    counts: list[tuple[int, int]] = []
    quantized = quantized_weights(model, policy_of("int4"))
    calibrate(
        model,
        parameters,
        quantized,
        Calibration("gptq", (1,) * 64),
        lambda done, total: counts.append((done, total)),
    )
    total = model.num_hidden_layers + 1
    assert counts == [(n, total) for n in range(1, total + 1)]
