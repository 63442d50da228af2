"""The tokenizer that a GGUF file describes."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from checkpoints.gguf.file import MetadataValue
from checkpoints.gguf.metadata import metadata_value
from checkpoints.token_rows import check_token_rows
from jaxinfer.config import SentencePieceSpec, TokenizerSpec

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

# The pre-tokenizers of Llama 3 and of Mistral since Nemo, by all their names.
_BEGINS_WITH_BOS = (
    *("llama-bpe", "llama3", "llama-v3", "pixtral", "falcon3", "falcon-h1"),
    *("jina-v5-nano", "lfm2", "midm-2.0", "tekken"),
)
_TEMPLATES = {
    "chat_template": "tokenizer.chat_template",
    "tool_template": "tokenizer.chat_template.tool_use",
}
# What templates call tokens, and what files do: they spell one in two ways.
_TEMPLATE_TOKENS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "mask": "mask",
}
# What ends a text or a turn, whatever the keys of a file say: converters name one end, which is not
# always the one that the chat template writes (Gemma 3, Phi-4-mini), and llama.cpp knows the others
# by their text. Not its "</s>", which is HTML in Gemma's vocabulary, and not what lies between
# Qwen's files: transformers does not end there.
_ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
    *("<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's
)
# Of Phi-3's control tokens, those that keep the white space behind them.
_PHI_3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")

_Metadata = Mapping[str, MetadataValue]


def read_tokenizer(metadata: _Metadata, vocab_size: int) -> TokenizerSpec | SentencePieceSpec:
    """The tokenizer. Raises ``ValueError`` when there is none, or of a kind that is not supported.

    ``vocab_size``: rows of the embedding.
    """
    kind = metadata_value(metadata, "tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer {kind!r:.40} is not supported; supported are gpt2 (byte-level BPE) and "
            "llama (SentencePiece's BPE)"
        )
    if metadata_value(metadata, "tokenizer.ggml.add_eos_token", bool, False):
        raise ValueError("tokenizer.ggml.add_eos_token is True: prompts that end are not supported")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    check_token_rows(len(tokens), vocab_size, range(vocab_size, len(tokens)))  # their number
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), default=1)
    special = np.flatnonzero((types == _CONTROL) | (types == _USER_DEFINED) | (types == _UNUSED))
    check_token_rows(len(tokens), vocab_size, special.tolist())
    # Older files have ends among what is text otherwise.
    is_end = np.isin(np.arange(len(tokens)), ends := _known_ends(tokens, types))
    control = (types == _CONTROL) | is_end
    common: dict[str, Any] = {
        "tokens": tokens,
        "control_token_ids": tuple(np.flatnonzero(control).tolist()),
        "added_token_ids": tuple(np.flatnonzero((types == _USER_DEFINED) & ~control).tolist()),
        "bos_token_id": _token_id(metadata, "bos", len(tokens)),
        "eos_token_ids": _end_ids(metadata, ends, len(tokens), vocab_size),
    }
    for field, key in _TEMPLATES.items():
        if key in metadata:
            common[field] = metadata_value(metadata, key, str)
    common["template_tokens"] = tuple(_template_tokens(metadata, tokens))
    # llama.cpp's defaults go by the kind: Llama 3 files often leave them out.
    if kind == "llama":
        return SentencePieceSpec(
            **common,
            scores=tuple(_numbers(metadata, "tokenizer.ggml.scores", len(tokens)).tolist()),
            unknown_token_id=_unknown_id(metadata, types),
            add_space_prefix=metadata_value(
                metadata, "tokenizer.ggml.add_space_prefix", bool, True
            ),
            add_bos_token=metadata_value(metadata, "tokenizer.ggml.add_bos_token", bool, True),
            rstrip_token_ids=_rstrip_ids(metadata, common["control_token_ids"], tokens),
        )
    pre_tokenizer = metadata_value(metadata, "tokenizer.ggml.pre", str)
    return TokenizerSpec(
        **common,
        merges=_strings(metadata, "tokenizer.ggml.merges"),
        pre_tokenizer=pre_tokenizer,
        add_bos_token=metadata_value(
            metadata, "tokenizer.ggml.add_bos_token", bool, pre_tokenizer in _BEGINS_WITH_BOS
        ),
    )


def _template_tokens(metadata: _Metadata, tokens: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, key in _TEMPLATE_TOKENS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        # Some files pad with a token that their vocabulary lost; nothing else depends on it.
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            yield f"{name}_token", tokens[token_id]


def _known_ends(tokens: tuple[str, ...], types: np.ndarray) -> list[int]:
    """Ids of ``_ENDS`` that are no ordinary tokens."""
    ids = (tokens.index(end) for end in _ENDS if end in tokens)
    return sorted(one for one in ids if types[one] in (_CONTROL, _USER_DEFINED))


def _end_ids(
    metadata: _Metadata, known: list[int], num_tokens: int, num_rows: int
) -> tuple[int, ...]:
    """End of text, of turn, of message; the model never writes one without a row."""
    ids = [*(_token_id(metadata, end, num_tokens) for end in ("eos", "eot", "eom")), *known]
    return tuple(dict.fromkeys(one for one in ids if one is not None and one < num_rows))


def _unknown_id(metadata: _Metadata, types: np.ndarray) -> int:
    unknown = _token_id(metadata, "unknown", len(types))
    if unknown is not None:
        return unknown
    found = np.flatnonzero(types == _UNKNOWN)
    if not len(found):
        raise ValueError("the tokenizer has no token for what is unknown")
    return int(found[0])


def _rstrip_ids(
    metadata: _Metadata, control_ids: tuple[int, ...], tokens: tuple[str, ...]
) -> tuple[int, ...]:
    """Phi-3's, as llama.cpp has them: a file cannot say so."""
    if metadata.get("general.architecture") != "phi3":
        return ()
    return tuple(token_id for token_id in control_ids if tokens[token_id] not in _PHI_3_PLAIN)


def _token_id(metadata: _Metadata, name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in metadata:
        return None
    token_id = metadata_value(metadata, key, int)
    if not 0 <= token_id < num_tokens:
        raise ValueError(f"{key} must be in [0, {num_tokens - 1}], got {token_id}")
    return token_id


def _strings(metadata: _Metadata, key: str) -> tuple[str, ...]:
    value = metadata.get(key)
    if not isinstance(value, tuple):
        raise ValueError(f"metadata key {key!r} must be an array of strings")
    return value


def _numbers(metadata: _Metadata, key: str, count: int, default: float | None = None) -> np.ndarray:
    value = metadata.get(key)
    if value is None and default is not None:
        return np.full(count, default)
    if not isinstance(value, np.ndarray) or len(value) != count:
        raise ValueError(f"{key} must be {count} numbers")
    if not np.isfinite(value).all():
        raise ValueError(f"{key} must be finite numbers")
    return value
