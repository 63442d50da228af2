"""Writes the small random models of every family as Hugging Face folders.

Names and fields are those that transformers saved, see tests/data/make_family_reference.py.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.data.random_family import draw
from tests.jaxinfer.models.random_checkpoint import CASES

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def write_folder(
    folder: Path,
    case: str,
    dtype: str = "F32",
    num_files: int = 1,
    prefix: str = "",
    changes: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    without: Collection[str] = (),
) -> None:
    """A folder with config.json and tensors, in ``num_files`` files with an index or in one.

    ``changes`` are of the configuration; ``extra`` tensors come on top, and those in
    ``without`` do not come.
    """
    folder.mkdir(exist_ok=True)
    config = {**CASES[case]["config"], **(changes or {})}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        prefix + name: draw(case, name, tuple(shape)).astype(DTYPES[dtype])
        for name, shape in CASES[case]["tensors"].items()
        if name not in without
    }
    tensors |= extra or {}
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    placed = {}
    for number in range(num_files):
        name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[number::num_files])
        save_file(part, folder / name)
        placed |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of 95 printable characters, "<|end|>" and further control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [character for character in alphabet if character <= "~"] + ["\u0120"]
    assert len(printable) < vocab_size
    ids = {character: number for number, character in enumerate(printable)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    others = [f"<|control {number}|>" for number in range(len(printable) + 1, vocab_size)]
    tokenizer.add_special_tokens(["<|end|>", *others])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
