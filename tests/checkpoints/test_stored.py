"""Stored integers, used as they are: the same model, in fewer bytes."""

from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from checkpoints.gguf.checkpoint import GGUFCheckpoint
from checkpoints.load import load_parameters
from checkpoints.stored import stored_formats
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.models import quantized_weights
from jaxinfer.request import Request
from jaxinfer.sharding import make_mesh
from jaxinfer.weights import GroupedFormat
from tests.checkpoints.gguf.family_gguf import write_gguf
from tests.checkpoints.gguf.tiny_gguf import (
    CONFIG,
    Q4_0,
    Q4_1,
    Q8_0,
    file_bytes,
    llama_metadata,
    llama_tensors,
)
from tests.checkpoints.stored import assert_same, parameters_of, policy
from tests.conftest import ManyDevices
from tests.data.random_llama import draw_weights
from tests.jaxinfer.tiny import CPU_DTYPES, run_all, tiny_config

KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1])
@pytest.mark.parametrize("case", ["mistral_window_20", "qwen3_moe", "gemma3"])
def test_parameters_stand_for_the_numbers_of_the_file(
    tmp_path: Path, case: str, kind: gguf.GGMLQuantizationType
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, case, kind)
    checkpoint = GGUFCheckpoint(path)
    dtypes = policy(checkpoint)
    made = quantized_weights(checkpoint.model, dtypes)
    assert ("layers", 0, "attention", "qkv") in made
    assert ("lm_head",) in made
    stored = parameters_of(checkpoint, dtypes)
    assert_same(parameters_of(checkpoint, CPU_DTYPES), stored, made)
    assert set(checkpoint.rounding.values()) == {0.0}


def mixed_bytes() -> bytes:
    """A Llama whose parts of one parameter are of different types."""
    tensors = llama_tensors(draw_weights(CONFIG, seed=3), number=Q4_1)
    eight, four = (llama_tensors(draw_weights(CONFIG, seed=3), number=n) for n in (Q8_0, Q4_0))
    for i, (name, *_) in enumerate(tensors):
        if "attn_v" in name:
            tensors[i] = eight[i]
        if "ffn_up" in name:
            tensors[i] = four[i]
    return file_bytes(llama_metadata(), tensors)


def test_tensors_of_different_types_share_the_smallest_format_with_room(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(mixed_bytes())
    checkpoint = GGUFCheckpoint(path)
    forms = dict(stored_formats(checkpoint))
    assert forms["layers", 0, "attention", "qkv"] == GroupedFormat(8, 32, "float16")
    assert forms["layers", 1, "mlp", "gate_up"] == GroupedFormat(4, 32, "float16")
    # Heads of 16.
    assert forms["layers", 0, "attention", "o_proj"] == GroupedFormat(4, 16, "float16")
    dtypes = policy(checkpoint)
    made = quantized_weights(checkpoint.model, dtypes)
    assert_same(parameters_of(checkpoint, CPU_DTYPES), parameters_of(checkpoint, dtypes), made)


def tokens_of(path: Path, num_devices: int, stored: bool) -> list[int]:
    """Returns what an engine makes of a prompt."""
    checkpoint = GGUFCheckpoint(path)
    dtypes = policy(checkpoint) if stored else CPU_DTYPES
    mesh = make_mesh(jax.devices()[:num_devices])
    engine = Engine(EngineSpec(checkpoint.model, tiny_config(), dtypes, mesh))
    engine.compile(shapes=engine.shapes[-1:])  # one is enough, and takes less time
    made = quantized_weights(checkpoint.model, dtypes, mesh)
    loaded = load_parameters(
        checkpoint,
        engine.abstract_parameters,
        num_devices=num_devices,
        quantized=made,
        stored=stored,
    )
    engine.start(loaded)
    return run_all(engine, [Request("a", (3, 5, 7, 4), 24, ignore_eos=True)])["a"]


@pytest.mark.thorough("stored integers through an engine")
def test_tokens_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "qwen3_moe", KINDS.Q4_1)
    assert tokens_of(path, 1, stored=True) == tokens_of(path, 1, stored=False)


@pytest.mark.thorough("stored integers over devices")
def test_eight_devices_give_the_same_tokens(tmp_path: Path, many_devices: ManyDevices) -> None:
    """Heads are repeated there, and ends padded."""
    path = tmp_path / "model.gguf"
    write_gguf(path, "qwen3_moe", KINDS.Q4_1)
    assert many_devices(tokens_of, path, 8, True) == tokens_of(path, 1, stored=True)


def test_scales_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "mistral_window_20", KINDS.Q8_0)
    (head,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "output.weight")
    data = bytearray(path.read_bytes())
    data[head.data_offset : head.data_offset + 2] = np.array([np.inf], np.float16).tobytes()
    path.write_bytes(data)
    checkpoint = GGUFCheckpoint(path)
    with pytest.raises(ValueError, match=r"model\.gguf: parameter .* has values that are not fin"):
        parameters_of(checkpoint, policy(checkpoint))


def test_floats_are_no_stored_integers(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "mistral_window_20", KINDS.F16)
    assert stored_formats(GGUFCheckpoint(path)) == ()
