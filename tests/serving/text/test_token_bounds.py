"""The fewest tokens that a text can have: never more than it has, and enough to refuse."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.hugging_face.tokenizer_json import read_tokenizer
from jaxinfer.config import AnyTokenizer, SentencePieceSpec, TokenizerJson, TokenizerSpec
from serving.text.tokenizer import Tokenizer
from tests.serving.text.test_tokenizer_reference import KINDS, SENTENCE_PIECE, TEXTS, spec_of

MANY = 4 << 20
# Longest tokens again and again, what NFC composes (up to four characters into one), what a
# vocabulary may lack, and special tokens with white space around.
PARTS = st.sampled_from(
    [
        *("a", " ", "  ", "\n", "\t", "\x00", "\x07", "\x7f", "\u2581", "\u4e2d", "\U0001f600"),
        *("e\u0301", "\u03b1\u0313\u0300\u0345", "\u1100\u1161\u11a8", "\u212a", "\u037e"),
        *("<|start|>", "<|end|>", "<s>", "</s>", "<0x41>", *(text[:40] for text in TEXTS)),
    ]
)


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer(specs()[name])


@cache
def specs() -> dict[str, AnyTokenizer]:
    """Every kind, and some with less in the vocabulary or with more that is dropped."""
    found = {name: spec_of(name) for name in KINDS}
    found |= {f"{name}, tokenizer.json": json_spec(name) for name in SENTENCE_PIECE}
    for name, spec in tuple(found.items()):
        if isinstance(spec, TokenizerSpec):
            lacking = {spec.tokens.index(token) for token in ("\u0100", "\u0107")}
            marks = tuple(f"<none {i}>" if i in lacking else t for i, t in enumerate(spec.tokens))
            found[f"{name} without control characters"] = replace(spec, tokens=marks)
        if isinstance(spec, SentencePieceSpec):
            found[f"{name} stripping"] = replace(spec, rstrip_token_ids=spec.control_token_ids)
    return found


def json_spec(name: str, changes: Mapping[str, Any] | None = None) -> TokenizerJson:
    """As a Hugging Face folder describes it, with changes."""
    kind = KINDS[name]
    fields = json.loads(kind["tokenizer_json"])
    for key, value in (changes or {}).items():
        fields[key] = {**fields[key], **value} if key == "model" else value
    with TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(fields))
        spec = read_tokenizer(Path(folder), len(kind["tokens"]), {})
    # Reading drops a truncation.
    return replace(spec, text=json.dumps(fields))


NAMES = sorted(specs())


@pytest.mark.parametrize("name", NAMES)
@given(parts=st.lists(PARTS, max_size=12), times=st.integers(1, 60), parses=st.booleans())
def test_never_more_than_there_are(name: str, parts: list[str], times: int, parses: bool) -> None:
    tokenizer = tokenizer_of(name)
    for text in ("".join(part * times for part in parts), "".join(parts) * times):
        num_tokens = len(tokenizer.encode(text, parse_special_tokens=parses))
        assert tokenizer._fewest_tokens(text, parses) <= num_tokens


@pytest.mark.parametrize("name", NAMES)
def test_never_more_than_there_are_of_each_token(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id] * 50, skip_control_tokens=False)
        for parses in (False, True):
            num_tokens = len(tokenizer.encode(text, parse_special_tokens=parses))
            assert tokenizer._fewest_tokens(text, parses) <= num_tokens


@pytest.mark.parametrize("name", NAMES)
def test_long_texts_are_refused_at_once(name: str) -> None:
    tokenizer = tokenizer_of(name)
    limited = tokenizer.limited(256)
    chat = [{"role": "user", "content": "a" * MANY}]
    with pytest.raises(ValueError, match=r"has 4194304 characters, .* max_model_len \(256\)"):
        limited.encode("a" * MANY)
    if tokenizer.has_chat_template:
        with pytest.raises(ValueError, match=r"max_model_len \(256\)"):
            limited.encode_chat(chat)


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "Removed",
                "invert": False,
            }
        },
        {"model": {"dropout": 0.5}},
    ],
    ids=str,
)
def test_nothing_is_known_where_characters_may_go(changes: dict[str, Any]) -> None:
    assert Tokenizer(json_spec(SENTENCE_PIECE[0]))._fewest_tokens("a" * MANY, False) > 0
    changed = Tokenizer(json_spec(SENTENCE_PIECE[0], changes))
    assert changed._fewest_tokens("a" * MANY, False) == 0


def test_nothing_is_known_of_unknown_characters_without_tokens_for_bytes() -> None:
    spec = spec_of(SENTENCE_PIECE[0])
    tokens = tuple(f"[none {i}]" if t == "<0x41>" else t for i, t in enumerate(spec.tokens))
    assert Tokenizer(replace(spec, tokens=tokens))._fewest_tokens("a" * MANY, False) == 0
