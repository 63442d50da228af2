"""Prefixes of tensors' names, by versions of transformers and ways of saving; names of others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from checkpoints.hugging_face.checkpoint import HuggingFaceCheckpoint
from checkpoints.load import open_checkpoint
from tests.checkpoints.hugging_face.family_folder import write_folder
from tests.jaxinfer.models.random_checkpoint import CASES, RandomCheckpoint

ONES = np.ones(3, np.float32)


def rename(folder: Path, renamed: Callable[[str], str]) -> None:
    """Gives the tensors of a folder's one file other names."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="numpy") as file:
        names = file.keys()  # the file itself is no mapping
        tensors = {renamed(name): file.get_tensor(name) for name in names}
    save_file(tensors, path)


def write_image_text(folder: Path, case: str, model_type: str, **outer: Any) -> None:
    """A folder whose config.json has ``case`` as its text part."""
    config = dict.fromkeys(CASES[case]["config"])
    text = CASES[case]["config"]
    changes = {**config, "model_type": model_type, "text_config": text, "vision_config": {}}
    write_folder(folder, case, changes=changes | outer)


def check_text(folder: Path, case: str) -> HuggingFaceCheckpoint:
    """The folder's tensors are those of ``case``."""
    checkpoint, source = HuggingFaceCheckpoint(folder), RandomCheckpoint(case)
    assert checkpoint.model == source.model
    for name in source.places:
        np.testing.assert_array_equal(checkpoint.tensor(name), source.tensor(name), err_msg=name)
    return checkpoint


def since_4_52(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


def before(name: str) -> str:
    return f"language_model.{name}"


@pytest.mark.parametrize(
    ("case", "model_type", "renamed", "images"),
    [
        ("gemma3", "gemma3", since_4_52, "model.vision_tower.a"),
        ("gemma3", "gemma3", before, "vision_tower.a"),
        ("mistral_window_5", "mistral3", since_4_52, "model.multi_modal_projector.a"),
        ("mistral_window_5", "mistral3", before, "multi_modal_projector.a"),
        ("qwen2", "internvl", since_4_52, "model.vision_tower.a"),
        ("qwen2", "llava_onevision", before, "image_newline"),
        (
            "qwen3",
            "smolvlm",
            lambda name: name.replace("model.", "model.text_model.", 1),
            "model.connector.a",
        ),
    ],
)
def test_the_text_part_of_a_model_that_sees_images(
    tmp_path: Path, case: str, model_type: str, renamed: Callable[[str], str], images: str
) -> None:
    write_image_text(tmp_path, case, model_type)
    rename(tmp_path, renamed)
    assert check_text(tmp_path, case).notes == ()
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    save_file(tensors | {images: ONES, f"{images}b": ONES}, path)
    (note,) = check_text(tmp_path, case).notes
    assert f"2 tensors for images are left out, {images!r} the first" in note


@pytest.mark.parametrize("case", ["qwen2", "gemma3"])
def test_a_model_saved_without_its_head(tmp_path: Path, case: str) -> None:
    """As AutoModel saves a tied one: nothing is missing."""
    write_folder(tmp_path, case)
    rename(tmp_path, lambda name: name.removeprefix("model."))
    check_text(tmp_path, case)


def test_a_text_part_that_leaves_its_type_out(tmp_path: Path) -> None:
    text = {k: v for k, v in CASES["gemma3"]["config"].items() if k != "model_type"}
    write_image_text(tmp_path, "gemma3", "gemma3", text_config=text)
    rename(tmp_path, since_4_52)
    check_text(tmp_path, "gemma3")


def test_a_tied_head_is_told_outside_the_text_part(tmp_path: Path) -> None:
    text = {k: v for k, v in CASES["qwen2"]["config"].items() if k != "tie_word_embeddings"}
    write_image_text(tmp_path, "qwen2", "internvl", text_config=text, tie_word_embeddings=True)
    rename(tmp_path, since_4_52)
    check_text(tmp_path, "qwen2")


def test_a_text_part_of_a_family_that_is_not_here(tmp_path: Path) -> None:
    write_image_text(tmp_path, "qwen2", "llava", text_config={"model_type": "phi"})
    with pytest.raises(ValueError, match=r"'phi' is not supported; supported: .*llava"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("prefix", "match"),
    [
        ("module.", r"names begin with 'module\.model\.', as DataParallel saves them: save"),
        ("_orig_mod.", r"begin with '_orig_mod\.model\.', as a compiled module saves"),
        ("base_model.model.", r"begin with 'base_model\.model\.model\.', as adapters are"),
        ("thing.", r"'model.embed_tokens.weight' is missing; names begin with 'thing.model.'$"),
    ],
)
def test_prefixes_that_are_refused(tmp_path: Path, prefix: str, match: str) -> None:
    write_folder(tmp_path, "qwen3")
    rename(tmp_path, lambda name: prefix + name)
    with pytest.raises(ValueError, match=match):
        open_checkpoint(tmp_path)


def test_names_of_another_format(tmp_path: Path) -> None:
    write_folder(tmp_path, "qwen3")
    rename(tmp_path, lambda name: name.replace("model.", "transformer.").replace("embed", "w"))
    with pytest.raises(ValueError, match=r"is missing; 'lm_head\.weight' is there"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], "neither model.safetensors nor .* is in it, and no other file of weights$"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "found 2 files, 'model-00001-of-00002.safetensors' the first: shards without their",
        ),
        (["pytorch_model.bin"], "found 1 files, 'pytorch_model.bin' the first; formats other"),
        (["adapter_model.safetensors"], "an adapter, merge it into its model first"),
        (["consolidated.safetensors"], "names of another format"),
        (["consolidated.00.pth"], "'consolidated.00.pth' the first: names of another format"),
        (["weights.safetensors"], "one file must be called model.safetensors"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, names: list[str], match: str) -> None:
    write_folder(tmp_path, "qwen3")
    (tmp_path / "model.safetensors").unlink()
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=match) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
