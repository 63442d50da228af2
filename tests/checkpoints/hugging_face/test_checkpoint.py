"""Hugging Face folders of every family against the tensors they were made of, and damaged ones."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.hugging_face.checkpoint import HuggingFaceCheckpoint
from checkpoints.json_file import read_json
from checkpoints.load import open_checkpoint
from tests.checkpoints.hugging_face.family_folder import DTYPES, write_folder
from tests.data.random_family import draw
from tests.jaxinfer.models.random_checkpoint import CASES, RandomCheckpoint
from tests.patience import WORK_SECONDS

FORMS = {"one file": ("F32", 1), "three bf16 files": ("BF16", 3), "two f16 files": ("F16", 2)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_tensor(tmp_path: Path, case: str, form: str) -> None:
    dtype, num_files = FORMS[form]
    write_folder(tmp_path, case, dtype, num_files)
    checkpoint, source = HuggingFaceCheckpoint(tmp_path), RandomCheckpoint(case, DTYPES[dtype])
    assert checkpoint.model == source.model
    for name in source.places:
        tensor = checkpoint.tensor(name)
        np.testing.assert_array_equal(tensor, source.tensor(name), err_msg=name, strict=True)


def test_the_text_part_of_a_gemma_that_sees_images(tmp_path: Path) -> None:
    text = CASES["gemma3"]["config"]
    changes = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    images = {"vision_tower.post_layernorm.weight": np.ones(3, np.float32)}
    write_folder(tmp_path, "gemma3", prefix="language_model.", changes=changes, extra=images)
    checkpoint, source = HuggingFaceCheckpoint(tmp_path), RandomCheckpoint("gemma3")
    assert checkpoint.model == source.model
    np.testing.assert_array_equal(checkpoint.tensor("layers.1.q"), source.tensor("layers.1.q"))


def test_harmless_extras(tmp_path: Path) -> None:
    """A tied head saved all the same, and buffers of older versions."""
    embedding = draw("qwen2", "model.embed_tokens.weight", (97, 112))
    extra = {
        "lm_head.weight": embedding,
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    write_folder(tmp_path, "qwen2", extra=extra)
    assert open_checkpoint(tmp_path).model.tie_word_embeddings


def test_a_tied_head_that_is_another_matrix(tmp_path: Path) -> None:
    """transformers takes it or not, by its version; here nothing is lost silently."""
    head = draw("qwen2", "model.embed_tokens.weight", (97, 112)).copy()
    head[96, 111] += 1
    write_folder(tmp_path, "qwen2", extra={"lm_head.weight": head})
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but 'lm_head\.weight' is"):
        HuggingFaceCheckpoint(tmp_path)


def test_unknown_tensor(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen3", extra={"model.layers.0.lora_a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"1 tensors that a qwen3 .* 'model.layers.0.lora_a' the"):
        HuggingFaceCheckpoint(tmp_path)
    write_folder(tmp_path, "qwen3")
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor 'layers.9.q'"):
        checkpoint.tensor("layers.9.q")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported: gemma3, .*qwen3_moe"),
        ({"model_type": 3}, "model_type must be"),
        ({"num_hidden_layers": 3}, r"tensor 'model.layers.2.* is missing"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 4096}, "4096 layers, but there are only 25 tensors"),
        ({"num_hidden_layers": 1}, "tensors that a qwen3 model does not have, 'model.layers.1"),
        ({"intermediate_size": 104}, r"has shape \(96, 96\), the model needs \(96, 104\)"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "relu"}, "hidden_act"),
        (
            {"quantization_config": {"quant_method": "vptq"}},
            "quantized by 'vptq' are not",
        ),
        ({"quantization_config": 3}, "quantization_config must be an object, got 3"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    write_folder(tmp_path, "qwen3", changes=changes)
    with pytest.raises(ValueError, match=match) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ([], "weight_map must be an object"),
        ({}, "weight_map must be an object"),
        ({"a": "../a.safetensors"}, r"'../a.safetensors' is no name of a safetensors file"),
        ({"a": "/dev/zero"}, "'/dev/zero' is no name"),
        ({"a": 3}, "'3' is no name"),
        ({"a": "model-3.safetensors"}, "model-3.safetensors: no such file"),
        ({"a": "model-00001-of-00002.safetensors"}, "tensor 'a' is not in model-00001-of-00002"),
        (
            {"lm_head.weight": "model-00001-of-00002.safetensors"},
            "'lm_head.weight' is not in|missing",
        ),
    ],
)
def test_indices_that_are_refused(tmp_path: Path, weight_map: Any, match: str) -> None:
    write_folder(tmp_path, "qwen3", num_files=2)
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=match):
        open_checkpoint(tmp_path)


def test_a_configuration_with_more_experts_than_tensors(tmp_path: Path) -> None:
    """A name is made for every expert of every layer: here a hundred gigabytes of names."""
    write_folder(tmp_path, "qwen3_moe", changes={"num_local_experts": 1 << 30})
    with pytest.raises(ValueError, match=r"2 layers of 1073741824 experts, but there are only"):
        open_checkpoint(tmp_path)


def test_json_is_read_in_the_memory_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    tracemalloc.start()
    assert read_json(path, 1 << 28) == {"a": 1}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_key_that_occurs_twice_among_many(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{" + "".join(f'"{n}": 0, ' for n in range(100_000)) + '"99999": 0}')
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"a.json: not valid: key '99999' occurs twice"):
        read_json(path, 1 << 28)
    # 0.1 s; with each key compared to all others it took minutes.
    assert time.thread_time() - start < WORK_SECONDS


def test_file_names_of_an_index_are_shown_in_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen3", num_files=2)
    index = {"weight_map": {"a": "a\nb.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'a\\nb.safetensors' is no name of a safetensors file"):
        open_checkpoint(tmp_path)


def test_the_words_of_the_library_are_cut(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen3")
    header = json.dumps("x" * 9000).encode()
    data = len(header).to_bytes(8, "little") + header
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged or not fetched to the end: .*xxx") as error:
        open_checkpoint(tmp_path)
    assert len(str(error.value)) < 600


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen3", num_files=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: no such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor model.safetensors.index"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"neither config.json \(a"):
        open_checkpoint(tmp_path)


def test_a_file_that_was_not_fetched_to_the_end(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen3")
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"cut off: expected \d+ bytes, found {size}$"):
            open_checkpoint(tmp_path)
    assert len(data) > 1000
    with pytest.raises(ValueError, match=f"expected {len(data)} bytes, found {len(data) - 1}"):
        open_checkpoint(tmp_path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen3", extra={"model.norm.weight": np.zeros(96, np.int32)})
    with pytest.raises(ValueError, match=r"'model.norm.weight' has type I32; supported are F32"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid"),
        ("[]", "must be a JSON object, is a list"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested too deeply"),
        ('{"a": 1%s}' % ("0" * 400), "a number has 401 digits, more than the limit of 40"),
        (" " * ((1 << 20) + 1), "larger than the limit of 1048576 bytes"),
        ("\udcff", "not UTF-8 at byte 0"),
    ],
)
def test_config_files_that_are_refused(tmp_path: Path, text: str, match: str) -> None:
    write_folder(tmp_path, "qwen3")
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=match):
        open_checkpoint(tmp_path)
