"""A kind of parameter that nobody knew, in a module of its own: declared here, and nowhere else.

A layer whose heads are gated [E, G, R], each kv head with a number of its own [G, D], beside
a pair of factors over the ffn: divided, padded and made of a checkpoint's tensors by their axes.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from checkpoints.load import load_parameters
from checkpoints.parameters import tensor_shapes
from jaxinfer import models, weights
from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.declaration import Declaration, Sources
from jaxinfer.models import layers, quantized_weights
from jaxinfer.models.family import Family
from jaxinfer.sharding import (
    TENSOR,
    abstract_parameters,
    make_mesh,
    num_tensor_devices,
    physical_model,
)
from tests.checkpoints.floats import FloatTensors
from tests.conftest import ManyDevices
from tests.jaxinfer.tiny import tiny_model

MODEL = tiny_model(architecture="gated", num_hidden_layers=2, intermediate_size=66)


class Layer(nnx.Module):
    """Parameters of four new kinds."""

    def __init__(self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs) -> None:
        embed, kv_heads, ffn = model.hidden_size, model.num_key_value_heads, model.intermediate_size
        group = model.num_attention_heads // kv_heads
        gate = Declaration(
            (embed, kv_heads, group), ("embed", "kv_heads", "heads"), (0,), Sources(("gate_q",))
        )
        self.head_gate = weights.declare(rngs, dtypes, gate)
        sink = Declaration((kv_heads, model.head_dim), ("kv_heads", "head_dim"))
        self.sink = layers.parameter(rngs, sink, "float32", fan_in=1)
        sources = Sources(("low", "high"), "bounds", (1, 2))
        bounds = Declaration((3, ffn), ("bounds", "ffn"), sources=sources)
        self.bounds = layers.parameter(rngs, bounds, "float32", fan_in=1)


class Gated(nnx.Module):
    """Layers, and a matrix with the vocabulary among its outputs."""

    def __init__(
        self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs, mesh: Mesh | None
    ) -> None:
        physical = physical_model(model, num_tensor_devices(mesh))
        self.layers = nnx.List(
            [Layer(physical, dtypes, rngs) for _ in range(model.num_hidden_layers)]
        )
        embed, vocab = physical.hidden_size, physical.vocab_size
        sources = Sources(("first", "second"), "twice", (1, 1))
        heads = Declaration((embed, 2, vocab), ("embed", "twice", "vocab"), (0,), sources)
        self.two_heads = weights.declare(rngs, dtypes, heads)


class Drawn(FloatTensors):
    """A checkpoint of such a model."""

    model = MODEL

    def __init__(self) -> None:
        shapes = tensor_shapes(models.declared_parameters(MODEL))
        random = np.random.default_rng(0)
        self.drawn = {
            name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()
        }

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by its canonical name."""
        return self.drawn[name]


def loaded_over(num_devices: int, quantization: str | None = None) -> dict[str, Any]:
    """Parameters of the second layer and the head, their specs, and the tensors they are of."""
    family = Family(Gated, lambda _: MODEL)
    with mock.patch.object(models, "family", return_value=family):
        source, mesh = Drawn(), make_mesh(jax.devices()[:num_devices])
        dtypes = DtypePolicy("float32", "float32", "float32", quantization=quantization)
        abstract = abstract_parameters(models.abstract(MODEL, dtypes, mesh)[1], mesh)
        made = quantized_weights(MODEL, dtypes, mesh)
        loaded = load_parameters(source, abstract, num_devices=num_devices, quantized=made)
    assert jax.tree.map(lambda x: x.shape, loaded) == jax.tree.map(lambda x: x.shape, abstract)
    found = {**loaded["layers"][1], "two_heads": loaded["two_heads"]}
    if quantization is not None:
        dequantized = made["layers", 1, "head_gate"].dequantize(found["head_gate"])
        return {"head_gate": np.asarray(dequantized), "tensors": source.drawn}
    specs = {name: array.sharding.spec for name, array in found.items()}
    return {**jax.tree.map(np.asarray, found), "specs": specs, "tensors": source.drawn}


def test_it_is_made_of_the_tensors_that_it_names() -> None:
    found = loaded_over(1)
    own = {name: found["tensors"][f"layers.1.{name}"] for name in ("gate_q", "sink", "low", "high")}
    kv_heads, head_dim, embed = MODEL.num_key_value_heads, MODEL.head_dim, MODEL.hidden_size
    gate = own["gate_q"].T.reshape(embed, kv_heads, -1)
    np.testing.assert_array_equal(found["head_gate"], gate)
    np.testing.assert_array_equal(found["sink"], own["sink"].reshape(kv_heads, head_dim))
    assert (own["low"].shape, own["high"].shape) == ((66,), (132,))
    bounds = np.concatenate([own["low"], own["high"]]).reshape(3, 66)
    np.testing.assert_array_equal(found["bounds"], bounds)
    for i, name in enumerate(("first", "second")):
        np.testing.assert_array_equal(found["two_heads"][:, i], found["tensors"][name].T)


def test_it_is_divided_and_padded_by_its_axes(many_devices: ManyDevices) -> None:
    """Over four devices: 2 kv heads twice, 3 query heads as 2 and 1, 66 of ffn as 68."""
    one, found = many_devices(loaded_over, 1), many_devices(loaded_over, 4)
    assert found["specs"] == {
        "head_gate": PartitionSpec(None, TENSOR, None),
        "sink": PartitionSpec(TENSOR, None),
        "bounds": PartitionSpec(None, TENSOR),
        "two_heads": PartitionSpec(None, None, TENSOR),
    }
    gate, zeros = one["head_gate"], np.zeros((MODEL.hidden_size, 1), np.float32)
    for copy, (kv_head, queries) in enumerate([(0, [0, 1]), (0, [2]), (1, [0, 1]), (1, [2])]):
        wanted = np.concatenate([gate[:, kv_head, queries], zeros], 1)[:, :2]
        np.testing.assert_array_equal(found["head_gate"][:, copy], wanted)
        np.testing.assert_array_equal(found["sink"][copy], one["sink"][kv_head])
    np.testing.assert_array_equal(found["bounds"], np.pad(one["bounds"], ((0, 0), (0, 2))))
    missing = -MODEL.vocab_size % 4
    padded = np.pad(one["two_heads"], ((0, 0), (0, 0), (0, missing)))
    np.testing.assert_array_equal(found["two_heads"], padded)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_matrix_of_it_is_quantized(name: str) -> None:
    found, plain = loaded_over(1, name)["head_gate"], loaded_over(1)["head_gate"]
    assert np.abs(found - plain).max() < 0.3
    assert (found != plain).any()
    assert found.dtype == jnp.float32
