"""Tokenizers of every kind against transformers and SentencePiece, token for token.

The vocabularies are small; tests/data/make_tokenizer_reference.py says where each way of splitting
comes from.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.hugging_face.tokenizer_json import read_tokenizer
from jaxinfer.config import AnyTokenizer, SentencePieceSpec, TokenizerSpec
from serving.text.tokenizer import Detokenizer, Tokenizer

DATA = Path(__file__).parents[2] / "data"
TEXTS: list[str] = json.loads((DATA / "tokenizer_corpus.json").read_text())["texts"]
KINDS: dict[str, dict[str, Any]] = json.loads((DATA / "tokenizer_reference.json").read_text())[
    "kinds"
]
BYTE_LEVEL = [name for name, kind in KINDS.items() if "pre_tokenizer" in kind]
SENTENCE_PIECE = [name for name, kind in KINDS.items() if "scores" in kind]
# SentencePiece's numbers for kinds of pieces.
UNKNOWN, CONTROL = 2, 3


def spec_of(name: str) -> AnyTokenizer:
    """As a GGUF file describes it."""
    kind = KINDS[name]
    if "pre_tokenizer" in kind:
        return TokenizerSpec(
            tokens=tuple(kind["tokens"]),
            merges=tuple(kind["merges"]),
            pre_tokenizer=kind["pre_tokenizer"],
            control_token_ids=(0, 1),
        )
    types = kind["types"]
    return SentencePieceSpec(
        tokens=tuple(kind["tokens"]),
        scores=tuple(kind["scores"]),
        unknown_token_id=types.index(UNKNOWN),
        control_token_ids=tuple(i for i, number in enumerate(types) if number == CONTROL),
        add_space_prefix=name == "sentencepiece",
    )


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: Tokenizer(spec_of(name)) for name in KINDS}


def with_text(expected: list[list[int]]) -> Iterator[tuple[str, list[int]]]:
    yield from zip(TEXTS, expected, strict=True)


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_ids(tokenizers: dict[str, Tokenizer], name: str) -> None:
    for text, ids in with_text(KINDS[name]["parsed"]):
        assert tokenizers[name].encode(text, parse_special_tokens=True) == ids, text
    for text, ids in with_text(KINDS[name]["literal"]):
        assert tokenizers[name].encode(text) == ids, text


@pytest.mark.parametrize("name", SENTENCE_PIECE)
def test_sentence_piece_ids(tokenizers: dict[str, Tokenizer], name: str) -> None:
    for text, ids in with_text(KINDS[name]["sentencepiece"]):
        assert tokenizers[name].encode(text) == ids, text


@pytest.mark.parametrize("name", KINDS)
def test_text_comes_back(tokenizers: dict[str, Tokenizer], name: str) -> None:
    kind, tokenizer = KINDS[name], tokenizers[name]
    for text, ids, decoded in zip(TEXTS, kind["literal"], kind["decoded"], strict=True):
        assert tokenizer.decode(ids) == decoded
        # U+2581 is SentencePiece's space, and Qwen's text is composed.
        if "\u2581" not in text and name != "qwen2":
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", SENTENCE_PIECE)
def test_tokenizer_json(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    (tmp_path / "tokenizer.json").write_text(kind["tokenizer_json"])
    spec = read_tokenizer(tmp_path, len(kind["tokens"]), {})
    assert spec.tokens == tuple(kind["tokens"])
    assert spec.add_space_prefix == (name == "sentencepiece")
    tokenizer = Tokenizer(spec)
    for text, ids in with_text(kind["parsed"]):
        own = tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=True)
        assert own == ids, text
    for text, ids in with_text(kind["literal"]):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text


@given(data=st.data())
@pytest.mark.parametrize("name", ["tekken", *SENTENCE_PIECE])
def test_a_stream_is_what_the_whole_has_behind_the_prompt(name: str, data: st.DataObject) -> None:
    tokenizer = Tokenizer(spec_of(name))
    token_id = st.integers(0, len(KINDS[name]["tokens"]) - 1)
    prompt = tokenizer.encode("x" + data.draw(st.sampled_from(TEXTS)))
    new = data.draw(st.lists(token_id, max_size=30))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add([token]) for token in new]
    so_far = tokenizer.decode(prompt)
    assert so_far + "".join(pieces) + detokenizer.finish() == tokenizer.decode(prompt + new)
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in tokenizer.decode(prompt + new)
