"""The fewest tokens that a text can have, known from its length before it is tokenized.

A token covers at most so many characters as the longest one has, so a prompt far beyond the context
is refused at once. Holds only where every character becomes a part of some token: where a tokenizer
may drop or merge characters without a bound, the fewest are 0. Knows no tokenizers of the library.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxinfer.config import AnyTokenizer, SentencePieceSpec, TokenizerJson, TokenizerSpec

# No character has a canonical decomposition of more than four: so NFC makes one of four at most.
_NFC_SHRINKS = 4
# Bytes that are in no UTF-8, and control characters, which NFC leaves alone and apart.
_NEVER = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
_CONTROL = frozenset((*range(0x20), 0x7F))
# Pre-tokenizers that only divide a text. One that removes what it splits at is not among them.
_DIVIDING = ("ByteLevel", "Digits", "Metaspace")

type FewestTokens = Callable[[str, bool], int]


def fewest_tokens(
    spec: AnyTokenizer, bytes_of: Callable[[int], bytes], bytes_with_tokens: frozenset[int]
) -> FewestTokens:
    """Returns a function of a text, and of whether special tokens in it are parsed.

    ``bytes_of`` tells the bytes of a token of the vocabulary; ``bytes_with_tokens`` have a token of
    their own, and others are dropped.
    """
    try:
        return _bound_of(spec, bytes_of, bytes_with_tokens)
    except (AttributeError, KeyError, RecursionError, TypeError):
        # A tokenizer.json that has something else somewhere: nothing is known of it.
        return _unknown


def _bound_of(
    spec: AnyTokenizer, bytes_of: Callable[[int], bytes], bytes_with_tokens: frozenset[int]
) -> FewestTokens:
    description: Mapping[str, Any] = {}
    if isinstance(spec, TokenizerJson):
        description = json.loads(spec.text)
        if not _only_divides(description) or _strips(description, special=False):
            return _unknown
    is_byte_level = isinstance(spec, TokenizerSpec) or (
        isinstance(spec, TokenizerJson) and spec.is_byte_level
    )
    strips = _strips(description, special=True) or (
        isinstance(spec, SentencePieceSpec) and bool(spec.rstrip_token_ids)
    )
    longest = max(map(len, spec.tokens), default=1)
    if not is_byte_level:
        falls_back = (description.get("model") or {"byte_fallback": True}).get("byte_fallback")
        if not falls_back or len(bytes_with_tokens) < 256:
            return _unknown  # unknown characters become one token together
        return _bounding(lambda text: len(text), longest, strips)
    longest = max(longest, max(len(bytes_of(i)) for i in range(len(spec.tokens))))
    dropped = frozenset(range(256)) - bytes_with_tokens
    if dropped and (description.get("model") or {}).get("unk_token") is not None:
        return _unknown
    if not _is_nfc(spec, description):
        table = bytes(dropped)
        return _bounding(lambda text: len(text.encode().translate(None, table)), longest, strips)
    if dropped - _NEVER - _CONTROL:
        return _unknown
    controls = dict.fromkeys(dropped & _CONTROL)
    return _bounding(lambda text: len(text.translate(controls)), longest * _NFC_SHRINKS, strips)


def _unknown(text: str, parses_special: bool) -> int:
    return 0


def _bounding(kept: Callable[[str], int], longest: int, strips: bool) -> FewestTokens:
    def fewest(text: str, parses_special: bool) -> int:
        # White space beside a special token may be dropped, however much it is.
        return 0 if parses_special and strips else -(-kept(text) // longest)

    return fewest


def _is_nfc(spec: AnyTokenizer, description: Mapping[str, Any]) -> bool:
    if isinstance(spec, TokenizerSpec):
        return spec.pre_tokenizer == "qwen2"
    return any(step["type"] == "NFC" for step in _steps(description.get("normalizer")))


def _only_divides(description: Mapping[str, Any]) -> bool:
    """Tells whether a tokenizer.json is known to give every character to some token."""
    model = description.get("model") or {}
    return (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and description.get("truncation") is None
        and all(map(_keeps, _steps(description.get("normalizer"))))
        and all(
            step["type"] in _DIVIDING
            or (step["type"] == "Split" and step.get("behavior") != "Removed")
            for step in _steps(description.get("pre_tokenizer"))
        )
    )


def _keeps(normalizer: Mapping[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        pattern, content = normalizer.get("pattern", {}).get("String"), normalizer.get("content")
        return pattern == " " and content == "\u2581"
    return normalizer["type"] in ("NFC", "Prepend")


def _strips(description: Mapping[str, Any], special: bool) -> bool:
    return any(
        (token.get("lstrip") or token.get("rstrip")) and bool(token.get("special")) is special
        for token in description.get("added_tokens") or ()
    )


def _steps(description: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a normalizer or a pre-tokenizer, those of sequences one by one."""
    if description is None:
        return
    if description.get("type") != "Sequence":
        yield {"type": None, **description}
        return
    for step in (*description.get("normalizers", ()), *description.get("pretokenizers", ())):
        yield from _steps(step)
