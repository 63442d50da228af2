"""Folders of AWQ, GPTQ and compressed-tensors against the integers that were packed."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints.converted.checkpoint import OrbaxCheckpoint
from checkpoints.converted.convert import Rounding, convert
from checkpoints.converted.quantization import Quantization
from checkpoints.hugging_face.checkpoint import HuggingFaceCheckpoint
from checkpoints.load import load_parameters
from checkpoints.stored import require_stored_formats, stored_formats
from jaxinfer import models
from jaxinfer.config import STORED
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.models import quantized_weights
from jaxinfer.request import Request
from jaxinfer.sharding import abstract_parameters, make_mesh
from jaxinfer.weights import GroupedFormat, Int8Format
from tests.checkpoints.hugging_face.family_folder import write_tokenizer
from tests.checkpoints.hugging_face.packed_folder import (
    AWQ,
    KINDS,
    SHUFFLED,
    Kind,
    Matrix,
    write_packed,
)
from tests.checkpoints.stored import assert_same, parameters_of, policy
from tests.conftest import ManyDevices
from tests.jaxinfer.models.random_checkpoint import RandomCheckpoint
from tests.jaxinfer.tiny import CPU_DTYPES, run_all, tiny_config
from tests.thorough import thorough_beyond

FORMATS = {
    "awq": GroupedFormat(4, 32, "float32", "float16"),
    "awq symmetric": GroupedFormat(4, 32, None, "float16"),
    "awq, groups of all inputs, bf16": GroupedFormat(4, 32, "float32", "float32"),
    "gptq": GroupedFormat(4, 32, None, "float16"),
    "gptq with zeros": GroupedFormat(4, 16, "float32", "float16"),
    "gptq v2 with zeros": GroupedFormat(4, 32, "float32", "float16"),
    "gptq 8 bits": GroupedFormat(8, 32, None, "float16"),
    "gptq 8 bits with zeros, groups of all inputs": GroupedFormat(8, 32, "float32", "float16"),
    "gptq 8 bits, groups of all inputs": Int8Format(),
    "packed": GroupedFormat(4, 32, None, "float16"),
    "packed with zeros": GroupedFormat(4, 32, "float32", "float32"),
    "packed by channel": GroupedFormat(4, 32, None, "float32"),
    "packed 8 bits": GroupedFormat(8, 32, None, "float16"),
    "int8": Int8Format(),
    "int8 with zeros": GroupedFormat(8, 32, "float32", "float16"),
    "int8 in groups": GroupedFormat(8, 16, None, "float16"),
}
# Plain, fused, and experts one by one.
FAMILIES = ("mistral_window_20", "phi3", "qwen3_moe")
Q = "model.layers.0.self_attn.q_proj"


def assert_tensors(folder: Path, case: str, matrices: dict[str, Matrix]) -> HuggingFaceCheckpoint:
    """All that was packed is read as the numbers it stands for."""
    checkpoint, num_packed = HuggingFaceCheckpoint(folder), 0
    for canonical, place in RandomCheckpoint(case).places.items():
        if place.names[0] in matrices:
            parts = [matrices[name].numbers[place.rows] for name in place.names]
            expected = np.stack(parts) if len(parts) > 1 else parts[0]
            np.testing.assert_array_equal(checkpoint.tensor(canonical), expected, canonical)
            num_packed += 1
    assert num_packed >= 14
    return checkpoint


@pytest.mark.parametrize(
    ("case", "kind"),
    thorough_beyond(
        [(FAMILIES[number % len(FAMILIES)], kind) for number, kind in enumerate(KINDS)],
        [(case, kind) for case in FAMILIES for kind in KINDS],
        "packed integers of more families",
    ),
)
def test_parameters_stand_for_what_was_packed(tmp_path: Path, case: str, kind: str) -> None:
    checkpoint = assert_tensors(tmp_path, case, write_packed(tmp_path, case, KINDS[kind]))
    dtypes = policy(checkpoint)
    made = quantized_weights(checkpoint.model, dtypes)
    assert ("layers", 0, "attention", "qkv") in made
    assert ("lm_head",) not in made
    assert len(made) == 8
    assert checkpoint.stored_format("layers.0.q") == FORMATS[kind]
    assert_same(parameters_of(checkpoint, CPU_DTYPES), parameters_of(checkpoint, dtypes), made)


@pytest.mark.parametrize("kind", SHUFFLED)
def test_groups_of_inputs_that_are_apart_are_read_as_floats(tmp_path: Path, kind: str) -> None:
    matrices = write_packed(tmp_path, "mistral_window_20", SHUFFLED[kind])
    checkpoint = assert_tensors(tmp_path, "mistral_window_20", matrices)
    assert stored_formats(checkpoint) == ()
    with pytest.raises(ValueError, match="holds no matrices of integers"):
        require_stored_formats("it", checkpoint)


@pytest.mark.parametrize("kind", [Kind("awq", group=40), Kind("gptq", group=40, symmetric=True)])
def test_a_last_group_that_is_shorter(tmp_path: Path, kind: Kind) -> None:
    """96 inputs in groups of 40, 40 and 16: 12 of 8."""
    matrices = write_packed(tmp_path, "mistral_window_20", kind)
    checkpoint = assert_tensors(tmp_path, "mistral_window_20", matrices)
    dtypes = policy(checkpoint)
    made = quantized_weights(checkpoint.model, dtypes)
    assert {getattr(weight.form, "group", None) for weight in made.values()} == {8}
    assert_same(parameters_of(checkpoint, CPU_DTYPES), parameters_of(checkpoint, dtypes), made)


def tokens_of(path: Path, num_devices: int, stored: bool) -> list[int]:
    """Returns what an engine makes of a prompt."""
    checkpoint = HuggingFaceCheckpoint(path)
    dtypes = policy(checkpoint) if stored else CPU_DTYPES
    mesh = make_mesh(jax.devices()[:num_devices])
    engine = Engine(EngineSpec(checkpoint.model, tiny_config(), dtypes, mesh))
    engine.compile(shapes=engine.shapes[-1:])  # one is enough, and takes less time
    made = quantized_weights(checkpoint.model, dtypes, mesh)
    abstract = engine.abstract_parameters
    engine.start(load_parameters(checkpoint, abstract, None, num_devices, made, stored))
    return run_all(engine, [Request("a", (3, 5, 7, 4), 24, ignore_eos=True)])["a"]


@pytest.mark.thorough("packed integers of more families")
def test_tokens_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    write_packed(tmp_path, "mistral_window_20", AWQ)
    plain = tokens_of(tmp_path, 1, stored=False)
    assert len(set(plain)) > 3
    assert tokens_of(tmp_path, 1, stored=True) == plain


@pytest.mark.thorough("stored integers over devices")
def test_tokens_on_eight_devices(tmp_path: Path, many_devices: ManyDevices) -> None:
    """Heads are repeated here, ends padded, and scales are the outputs' own."""
    write_packed(tmp_path, "qwen3_moe", KINDS["int8"])
    assert many_devices(tokens_of, tmp_path, 8, True) == tokens_of(tmp_path, 1, stored=False)


@pytest.mark.thorough("stored integers over devices")
def test_scales_of_divided_inputs(tmp_path: Path, many_devices: ManyDevices) -> None:
    """A dense MLP's inputs are divided in whole groups: scales are not padded beyond theirs."""
    write_packed(tmp_path, "mistral_window_20", KINDS["int8 in groups"])
    assert many_devices(tokens_of, tmp_path, 2, True) == tokens_of(tmp_path, 1, stored=False)


def test_another_format_is_made_of_the_numbers(tmp_path: Path) -> None:
    """As ``--quantize int8`` does it: of matrices that were packed, and of all others."""
    matrices = write_packed(tmp_path, "mistral_window_20", AWQ)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    dtypes = dataclasses.replace(CPU_DTYPES, quantization="int8")
    made = quantized_weights(checkpoint.model, dtypes)
    _, state = models.abstract(checkpoint.model, dtypes)
    abstract = abstract_parameters(state, make_mesh(jax.devices()[:1]))
    loaded = load_parameters(checkpoint, abstract, quantized=made)
    path = ("layers", 0, "mlp", "down_proj")
    arrays = loaded["layers"][0]["mlp"]["down_proj"]
    numbers = matrices["model.layers.0.mlp.down_proj.weight"].numbers.T
    error = np.abs(np.asarray(made[path].dequantize(arrays)) - numbers).max(0)
    assert (error <= np.abs(numbers).max(0) / 254 * 1.001).all()


def test_integers_are_converted(tmp_path: Path) -> None:
    write_packed(tmp_path / "packed", "phi3", AWQ)
    write_tokenizer(tmp_path / "packed", 97)
    source = HuggingFaceCheckpoint(tmp_path / "packed")
    quantization = Quantization(STORED, require_stored_formats("it", source))
    convert(source, tmp_path / "converted", np.dtype(np.float32), {}, None, Rounding(quantization))
    checkpoint, dtypes = OrbaxCheckpoint(tmp_path / "converted"), quantization.policy
    _, state = models.abstract(source.model, dtypes)
    abstract = abstract_parameters(state, make_mesh(jax.devices()[:1]))
    made = quantized_weights(source.model, dtypes)
    found = load_parameters(checkpoint, abstract, quantized=made)
    wanted = load_parameters(source, abstract, quantized=made, stored=True)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
