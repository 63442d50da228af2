"""Tokenizers that the library takes and cannot use, or uses otherwise than their file says."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from checkpoints.load import open_checkpoint
from jaxinfer.config import SentencePieceSpec
from serving.text.tokenizer import Tokenizer
from tests.checkpoints.hostile_corpus import write_sentence_piece_folder
from tests.patience import WORK_SECONDS


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        # What the library raises when it encodes, no ValueError by itself.
        (("model", "unk_token"), "absent", "Unk token `absent` not found"),
        # It panics, which is no Exception.
        (("post_processor", "special_tokens"), {}, "no entry found for key"),
        (("model", "continuing_subword_prefix"), "long prefix", "out of range|slice index"),
        (("normalizer", "normalizers", 1, "pattern"), {"String": ""}, "index out of bounds"),
        # It believes any id here; the model has no such row.
        (
            ("post_processor", "special_tokens", "<s>", "ids"),
            [5000],
            "gives token id 5000, the vocabulary has 10 tokens",
        ),
        # It numbers added tokens by itself: prompts would have another id than the file's.
        (("added_tokens", 2, "id"), 50, "added token '<|x|>' has id 50, by its place it is 8"),
    ],
)
def test_tokenizer_files_that_are_refused(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, match: str
) -> None:
    folder = tmp_path / "folder"
    write_sentence_piece_folder(folder)
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text())
    *above, last = path
    inner = fields
    for key in above:
        inner = inner[key]
    inner[last] = value
    file.write_text(json.dumps(fields))
    spec = open_checkpoint(folder).tokenizer
    with pytest.raises(ValueError, match=f"^tokenizer.json is not valid: .*({match})") as error:
        Tokenizer(spec)
    assert "\n" not in str(error.value)


def test_a_token_of_a_megabyte() -> None:
    """All its splits would be terabytes."""
    tokens = ("<unk>", "a" * (1 << 20))
    spec = SentencePieceSpec(tokens=tokens, scores=(0.0, 0.0), unknown_token_id=0)
    start = time.thread_time()
    with pytest.raises(ValueError, match="token 1 has 1048576 characters, more than the limit"):
        Tokenizer(spec)
    assert time.thread_time() - start < WORK_SECONDS
