import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from checkpoints.fetch.catalog import resolve
from checkpoints.gguf.checkpoint import GGUFCheckpoint
from checkpoints.load import load_parameters, open_checkpoint
from jaxinfer import models, sharding
from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.models import parameter_shapes
from jaxinfer.sharding import make_mesh
from tests.checkpoints.floats import FloatTensors
from tests.checkpoints.gguf import tiny_gguf
from tests.conftest import ManyDevices
from tests.data.random_llama import CONFIGS, draw_weights
from tests.patience import WORK_SECONDS


@dataclass(frozen=True)
class RandomWeights(FloatTensors):
    """Weights drawn by name."""

    model: ModelConfig
    weights: dict[str, np.ndarray]

    def tensor(self, name: str) -> np.ndarray:
        return self.weights[name]


def random_weights(name: str) -> RandomWeights:
    config = CONFIGS[name] | {"architecture": "llama", "rope_scaling": None}
    return RandomWeights(ModelConfig(**config), draw_weights(config, seed=1))


def abstract_parameters(model: ModelConfig, dtype: Any = jnp.float32) -> dict[Any, Any]:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    tree: dict[Any, Any] = {}
    for path, shape in parameter_shapes(model).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return tree


@pytest.mark.parametrize("name", ["grouped_tied", "multi_head_untied", "wide_heads"])
def test_every_number_stands_where_the_model_reads_it(name: str) -> None:
    source = random_weights(name)
    model, weights = source.model, source.weights
    abstract = abstract_parameters(model)
    loaded = load_parameters(source, abstract)
    assert jax.tree.structure(loaded) == jax.tree.structure(abstract)
    np.testing.assert_array_equal(loaded["norm"], weights["norm"])
    assert ("embed_tokens" in loaded) == (not model.tie_word_embeddings)
    if "embed_tokens" in loaded:
        np.testing.assert_array_equal(loaded["embed_tokens"], weights["embed_tokens"])
        np.testing.assert_array_equal(loaded["lm_head"], weights["lm_head"].T)
    else:
        np.testing.assert_array_equal(loaded["lm_head"], weights["embed_tokens"].T)
    dim, queries = model.head_dim, model.num_attention_heads // model.num_key_value_heads
    for layer, modules in loaded["layers"].items():
        parameters = {**modules, **modules["attention"], **modules["mlp"]}
        own = {part: weights[f"layers.{layer}.{part}"] for part in ("q", "k", "v", "o", "down")}
        for group in range(model.num_key_value_heads):
            for query in range(queries):
                rows = slice((group * queries + query) * dim, (group * queries + query + 1) * dim)
                np.testing.assert_array_equal(parameters["qkv"][:, group, query], own["q"][rows].T)
                np.testing.assert_array_equal(
                    parameters["o_proj"][group, query], own["o"][:, rows].T
                )
            rows = slice(group * dim, (group + 1) * dim)
            np.testing.assert_array_equal(parameters["qkv"][:, group, queries], own["k"][rows].T)
            np.testing.assert_array_equal(
                parameters["qkv"][:, group, queries + 1], own["v"][rows].T
            )
        gate, up = weights[f"layers.{layer}.gate"], weights[f"layers.{layer}.up"]
        np.testing.assert_array_equal(parameters["gate_up"][:, 0], gate.T)
        np.testing.assert_array_equal(parameters["gate_up"][:, 1], up.T)
        np.testing.assert_array_equal(parameters["down_proj"], own["down"].T)
        for norm in ("input_norm", "post_attention_norm"):
            np.testing.assert_array_equal(parameters[norm], weights[f"layers.{layer}.{norm}"])


def test_dtype_sharding_and_progress() -> None:
    source = random_weights("grouped_tied")
    abstract = abstract_parameters(source.model, jnp.bfloat16)
    calls: list[tuple[int, int]] = []
    loaded = load_parameters(source, abstract, lambda *call: calls.append(call))
    total = len(jax.tree.leaves(abstract))
    assert calls == [(done, total) for done in range(1, total + 1)]
    for array, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(abstract), strict=True):
        assert (array.dtype, array.sharding) == (jnp.bfloat16, wanted.sharding)
    expected = source.weights["layers.1.down"].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(loaded["layers"][1]["mlp"]["down_proj"], expected)


def test_parameters_that_do_not_fit_are_named() -> None:
    source = random_weights("grouped_tied")
    abstract = abstract_parameters(source.model)
    leaf = abstract["norm"]
    with pytest.raises(ValueError, match=r"nothing for parameter \('embed_tokens',\)"):
        load_parameters(source, abstract | {"embed_tokens": leaf})
    with pytest.raises(ValueError, match=r"lacks parameter \('norm',\)"):
        load_parameters(source, {key: abstract[key] for key in abstract if key != "norm"})
    wrong = jax.ShapeDtypeStruct((7,), jnp.float32)
    with pytest.raises(ValueError, match=r"\('norm',\) has shape \(7,\), .* gives \(144,\)"):
        load_parameters(source, abstract | {"norm": wrong})
    wrong = jax.ShapeDtypeStruct((144,), jnp.int8)
    with pytest.raises(ValueError, match=r"\('norm',\) has dtype int8; supported are float32"):
        load_parameters(source, abstract | {"norm": wrong})


def test_a_failure_ends_the_loading() -> None:
    source = random_weights("grouped_tied")
    del source.weights["layers.0.up"]
    with pytest.raises(KeyError, match=r"layers\.0\.up"):
        load_parameters(source, abstract_parameters(source.model))


def test_a_gguf_file_gives_the_parameters_of_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf.llama_bytes())
    checkpoint = open_checkpoint(path)
    source = RandomWeights(checkpoint.model, draw_weights(tiny_gguf.CONFIG, seed=3))
    abstract = abstract_parameters(checkpoint.model)
    expected, loaded = load_parameters(source, abstract), load_parameters(checkpoint, abstract)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: no such file"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"neither config\.json .* nor jaxinfer\.json .* is in"):
        open_checkpoint(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="a device or a pipe, no checkpoint"):
        open_checkpoint(pipe)
    for content in (b"", b"GG", b"PK\x03\x04 a zip file", bytes(100)):
        other = tmp_path / "other"
        other.write_bytes(content)
        with pytest.raises(ValueError, match="unknown checkpoint format, starts with b"):
            open_checkpoint(other)


def loaded_over(num_devices: int, name: str) -> dict[Any, np.ndarray]:
    """Parameters of a random model by path, loaded over so many devices and read back."""
    source = random_weights(name)
    mesh = make_mesh(jax.devices()[:num_devices])
    _, state = models.abstract(source.model, DtypePolicy.for_platform("cpu"), mesh)
    abstract = sharding.abstract_parameters(state, mesh)
    loaded = load_parameters(source, abstract, num_devices=num_devices)
    for array, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.sharding) == (wanted.shape, wanted.sharding)
    return {
        tuple(entry.key for entry in path): np.asarray(array)
        for path, array in jax.tree.leaves_with_path(loaded)
    }


@pytest.mark.parametrize(("name", "num_devices"), [("grouped_tied", 6), ("multi_head_untied", 8)])
def test_physical_parameters_stand_for_those_of_one_device(
    many_devices: ManyDevices, name: str, num_devices: int
) -> None:
    model = random_weights(name).model
    physical = sharding.physical_model(model, num_devices)
    one, declared = many_devices(loaded_over, 1, name), models.declared_parameters(model)
    for path, array in many_devices(loaded_over, num_devices, name).items():
        wanted = sharding.physical_parameter(declared[path].axes, one[path], model, physical)
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.model
def test_the_default_model_loads_in_seconds() -> None:
    start = time.process_time()
    checkpoint = open_checkpoint(resolve("smollm2-135m-instruct"))
    parameters = load_parameters(checkpoint, abstract_parameters(checkpoint.model))
    jax.block_until_ready(parameters)
    # 0.7 s of two cores: of processors' time, since others may have them meanwhile.
    assert time.process_time() - start < WORK_SECONDS
    assert isinstance(checkpoint, GGUFCheckpoint)
    down = checkpoint.tensor("layers.7.down")
    np.testing.assert_array_equal(parameters["layers"][7]["mlp"]["down_proj"], down.T)


def test_numbers_that_are_not_finite_are_named() -> None:
    source = random_weights("grouped_tied")
    source.weights["layers.1.k"][3, 5] = np.nan
    with pytest.raises(
        ValueError, match=r"\('layers', 1, 'attention', 'qkv'\) has values that are not finite"
    ):
        load_parameters(source, abstract_parameters(source.model))


def test_a_file_with_numbers_that_are_not_finite_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    data = tiny_gguf.llama_bytes()
    path.write_bytes(data[:-4] + np.float32(np.inf).tobytes())
    checkpoint = open_checkpoint(path)
    with pytest.raises(ValueError, match=r"tiny.gguf: parameter \(.* not finite"):
        load_parameters(checkpoint, abstract_parameters(checkpoint.model))
