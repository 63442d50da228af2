"""Packed folders that are damaged, or made in ways that are not supported: one line each."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.hugging_face.checkpoint import HuggingFaceCheckpoint
from checkpoints.hugging_face.quantization_config import read_packing
from checkpoints.stored import stored_formats
from tests.checkpoints.hugging_face.packed_folder import AWQ, GPTQ, KINDS, Kind, write_packed
from tests.checkpoints.stored import parameters_of, policy
from tests.jaxinfer.tiny import CPU_DTYPES

CASE = "mistral_window_20"
Q = "model.layers.0.self_attn.q_proj"
PACKED, INT8 = KINDS["packed with zeros"], KINDS["int8"]


def changed(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """``config`` with ``value`` at ``path``, the names of objects within each other."""
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    place = config
    for name in parents:
        place = place[name]
    place[last] = value
    return config


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    ("kind", "path", "value", "match"),
    [
        (AWQ, "quant_method", "bitsandbytes", "quantized by 'bitsandbytes' are not supported"),
        (AWQ, "quant_method", ["awq"], r"quantized by \['awq'\] are not"),
        (AWQ, "version", "gemv", "version is 'gemv'; only 'gemm'"),
        (AWQ, "version", 3, "version must be a string, got 3"),
        (AWQ, "bits", 8, "bits is 8; only 4"),
        (AWQ, "bits", True, "bits is True; only 4"),
        (AWQ, "zero_point", 1, "zero_point must be true or false"),
        (AWQ, "group_size", 0, "group_size must be -1 or"),
        (AWQ, "group_size", -2, "group_size must be a whole number"),
        (AWQ, "group_size", 1 << 60, "group_size must be a whole number"),
        (AWQ, "group_size", None, "group_size is missing"),
        (GPTQ, "bits", 3, "bits is 3; only 4 or 8"),
        (GPTQ, "checkpoint_format", "marlin", "checkpoint_format is 'marlin'; only 'gptq'"),
        (GPTQ, "format", "gptq_v2", "format is 'gptq_v2'; only 'gptq' is"),
        (GPTQ, "sym", "yes", "sym must be true or false"),
        (GPTQ, "desc_act", [], "desc_act must be true or false"),
        (GPTQ, "dynamic", {"+:.*": {"bits": 8}}, r"dynamic is \{'\+:"),
        (GPTQ, "dynamic", 3, "dynamic is 3, which is not supported"),
        (PACKED, "format", "float-quantized", "format is 'float-quantized'; only 'pack-quant"),
        (PACKED, "format", "marlin-24", "format is 'marlin-24'; only 'pack-quantized'"),
        (PACKED, "format", None, "format is missing"),
        (PACKED, "kv_cache_scheme", {"num_bits": 8}, r"kv_cache_scheme is \{'num_bits': 8\}"),
        (
            PACKED,
            "sparsity_config",
            {"format": "sparse-24"},
            "config.format is 'sparse-24'",
        ),
        (PACKED, "sparsity_config", 3, "sparsity_config must be an object"),
        (PACKED, "transform_config", {"a": 1}, "transform_config is"),
        (PACKED, "config_groups", [], "config_groups must be an object"),
        (PACKED, "config_groups", {"a": 3}, "config_groups.a must be an object"),
        (PACKED, f"{GROUP}.weights", None, "group_0.weights is missing"),
        (PACKED, f"{GROUP}.weights.type", "float", "weights.type is 'float'; only 'int'"),
        (PACKED, f"{GROUP}.weights.num_bits", 2, "weights.num_bits is 2; only 4 or 8"),
        (PACKED, f"{GROUP}.weights.strategy", "block", "strategy is 'block'; only 'group' or"),
        (PACKED, f"{GROUP}.weights.symmetric", 0, "weights.symmetric must be true"),
        (INT8, f"{GROUP}.weights.num_bits", 4, "weights.num_bits is 4; only 8"),
        (INT8, f"{GROUP}.input_activations.dynamic", False, "input_activations.dynamic is False"),
        (INT8, f"{GROUP}.input_activations.dynamic", None, "input_activations.dynamic is False"),
        (INT8, f"{GROUP}.input_activations.type", "float", "input_activations.type is 'float'"),
        (INT8, f"{GROUP}.output_activations", {"a": 1}, "output_activations is"),
        (INT8, "config_groups.b", {"weights": {}}, "config_groups.b.weights.num_bits is missing"),
    ],
)
def test_configurations_that_are_refused(kind: Kind, path: str, value: object, match: str) -> None:
    assert read_packing({"quantization_config": kind.config})
    config = changed(kind.config, path, value)
    with pytest.raises(ValueError, match=match) as error:
        read_packing({"quantization_config": config})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_several_kinds_of_one_folder_are_refused() -> None:
    groups = PACKED.config["config_groups"]["group_0"]
    other = changed(groups, "weights.group_size", 64)
    config = changed(PACKED.config, "config_groups", {"a": groups, "b": other})
    with pytest.raises(ValueError, match="config_groups are 2 different ones"):
        read_packing({"quantization_config": config})
    config = changed(config, "config_groups.b", groups)
    assert read_packing({"quantization_config": config})


def test_the_newer_name_of_a_form_of_zero_points() -> None:
    config = GPTQ.config | {"checkpoint_format": None, "format": "gptq_v2"}
    packing = read_packing({"quantization_config": config})
    assert packing is not None
    assert packing.zero_offset == 0


def test_a_configuration_of_the_text_part_counts() -> None:
    assert read_packing({"text_config": {"quantization_config": AWQ.config}})
    assert read_packing({"text_config": 3}) is None


def _paths(value: object, path: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [path]
    inner = [p for name in value for p in _paths(value[name], f"{path}.{name}".strip("."))]
    return [*inner, path] if path else inner


def test_fields_of_any_type_are_read_or_refused() -> None:
    """Each field, each wrong value: a packing, or ``ValueError``."""
    values = [None, True, 0, -1, 1 << 80, 1e300, "", "x" * 9000, [], [{}], {}, {"a": {"a": 1}}]
    messages: list[str] = []
    for kind in (AWQ, GPTQ, PACKED, INT8):
        for path in _paths(kind.config):
            for value in values:
                try:
                    config = changed(kind.config, path, value)
                    read_packing({"quantization_config": config})
                except ValueError as error:
                    messages.append(str(error))
    assert len(messages) > 200
    assert max(map(len, messages)) < 400


WORDS = np.zeros((3, 5), np.int32)


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "match"),
    [
        (AWQ, "qweight", WORDS, r"qweight' has shape \(3, 5\), the model needs \(96, 12\)"),
        (AWQ, "qzeros", WORDS, r"qzeros' has shape \(3, 5\), the model needs \(3, 12\)"),
        (AWQ, "scales", WORDS, r"scales' has shape \(3, 5\), the model needs \(3, 96\)"),
        (AWQ, "qzeros", None, r"q_proj.qzeros' is missing"),
        (AWQ, "qweight", None, r"q_proj.weight' is missing"),
        (
            AWQ,
            "qweight",
            np.zeros((96, 12), np.float32),
            "qweight' has type F32; supported are I32",
        ),
        (AWQ, "scales", np.zeros((3, 96), np.int32), "scales' has type I32; supported are F32"),
        (
            AWQ,
            "weight",
            np.zeros((96, 96), np.float32),
            "1 tensors that a mistral .*q_proj.weight'",
        ),
        (AWQ, "bias", np.ones(96, np.float32), r"1 tensors that a mistral .*q_proj.bias'"),
        (GPTQ, "qweight", WORDS, r"the model needs \(12, 96\)"),
        (GPTQ, "g_idx", np.zeros(95, np.int32), r"g_idx' has shape \(95,\), the model needs \(96"),
        (GPTQ, "g_idx", np.zeros(96, np.float32), "g_idx' has type F32; supported are I32, I64"),
        (GPTQ, "g_idx", None, "g_idx' is missing"),
        (PACKED, "weight_packed", WORDS, r"the model needs \(96, 12\)"),
        (PACKED, "weight_scale", WORDS, r"the model needs \(96, 3\)"),
        (PACKED, "weight_zero_point", WORDS, r"the model needs \(12, 3\)"),
        (PACKED, "weight_shape", np.array([96, 95]), r"weight_shape' is \[96, 95\], not \[96, 96"),
        (PACKED, "weight_shape", None, "weight_shape' is missing"),
        (PACKED, "input_scale", np.ones(1, np.float32), "q_proj.input_scale'"),
        (INT8, "weight_scale", np.ones(97, np.float16), r"\(97,\), the model needs \(96, 1\)"),
        (INT8, "weight", np.zeros((96, 95), np.int8), r"\(96, 95\), the model needs \(96, 96\)"),
        (INT8, "weight", np.zeros((96, 96), np.float16), "1 tensors .*q_proj.weight_scale'"),
        (INT8, "weight_scale", None, "weight_scale' is missing"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, kind: Kind, name: str, tensor: np.ndarray | None, match: str
) -> None:
    write_packed(tmp_path, CASE, kind, tensors={f"{Q}.{name}": tensor})
    with pytest.raises(ValueError, match=match) as error:
        HuggingFaceCheckpoint(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("group", [-1, 3, 1 << 30])
def test_groups_out_of_range(tmp_path: Path, group: int) -> None:
    groups_of = np.arange(96, dtype=np.int32) // 32
    groups_of[5] = group
    write_packed(tmp_path, CASE, GPTQ, tensors={f"{Q}.g_idx": groups_of})
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    with pytest.raises(ValueError, match=r"q_proj.g_idx' has groups outside \[0, 2\]"):
        checkpoint.tensor("layers.0.q")
    with pytest.raises(ValueError, match=r"q_proj.g_idx' has groups outside \[0, 2\]"):
        stored_formats(checkpoint)


@pytest.mark.parametrize("kind", [Kind("awq"), Kind("gptq"), Kind("pack-quantized")])
def test_zero_points_that_the_configuration_denies(tmp_path: Path, kind: Kind) -> None:
    config = {"zero_point": False, "sym": True}
    if kind.layout == "pack-quantized":
        config = changed(kind.config, f"{GROUP}.weights.symmetric", True)
    write_packed(tmp_path, CASE, kind, config)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    for read in (checkpoint.tensor, checkpoint.integers):
        with pytest.raises(ValueError, match=r"has zero points, which quantization_config denies"):
            read("layers.0.q")


def test_scales_that_are_not_finite_are_named(tmp_path: Path) -> None:
    scales = np.full((3, 96), np.inf, np.float16)
    write_packed(tmp_path, CASE, AWQ, tensors={f"{Q}.scales": scales})
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    for dtypes in (CPU_DTYPES, policy(checkpoint)):
        with pytest.raises(ValueError, match=r"parameter .* has values that are not finite"):
            parameters_of(checkpoint, dtypes)


def test_packed_tensors_without_a_configuration(tmp_path: Path) -> None:
    write_packed(tmp_path, CASE, AWQ)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("quantization_config", "other_config"))
    with pytest.raises(ValueError, match=r"tensor .*weight' is missing"):
        HuggingFaceCheckpoint(tmp_path)


def test_matrices_of_floats_among_packed_ones(tmp_path: Path) -> None:
    """And biases of zeros, which AutoGPTQ gave to every matrix."""
    random_matrix = np.random.RandomState(0).standard_normal((96, 96)).astype(np.float16)
    names = ("qweight", "qzeros", "scales", "g_idx")
    tensors: dict[str, Any] = {f"{Q}.{name}": None for name in names}
    down = "model.layers.1.mlp.down_proj.bias"
    extra = {f"{Q}.weight": random_matrix, down: np.zeros(96, np.float16)}
    write_packed(tmp_path, CASE, GPTQ, tensors=tensors | extra)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.tensor("layers.0.q"), random_matrix)
    paths = [path for path, _ in stored_formats(checkpoint)]
    assert ("layers", 1, "attention", "qkv") in paths
    assert ("layers", 0, "attention", "qkv") not in paths  # not all of it is of integers
    assert ("layers", 0, "attention", "o_proj") in paths


def test_damaged_folders(tmp_path: Path) -> None:
    """A byte here and there: read, or refused in one line."""
    write_packed(tmp_path, CASE, PACKED)
    path, draw = tmp_path / "model.safetensors", random.Random(0)
    sound = path.read_bytes()
    header = int.from_bytes(sound[:8], "little")
    messages: list[str] = []
    for _ in range(60):
        data = bytearray(sound)
        data[draw.randrange(8 + header)] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            checkpoint = HuggingFaceCheckpoint(tmp_path)
            for part in "qkvo":
                checkpoint.tensor(f"layers.0.{part}")
            stored_formats(checkpoint)
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)
