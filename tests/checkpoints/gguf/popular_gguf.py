"""Writes the popular checkpoints that are GGUF files, small and of random weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from tests.checkpoints.gguf.tiny_gguf import (
    ARRAY,
    BOOL,
    F32,
    FLOAT32,
    INT32,
    Q8_0,
    STRING,
    UINT32,
    file_bytes,
    tensor,
)
from tests.checkpoints.hugging_face.popular_folder import draw
from tests.checkpoints.popular import HEAD_DIM, NUM_LAYERS, SmallVocabulary, template

_KINDS = {"u32": UINT32, "i32": INT32, "f32": FLOAT32, "str": STRING, "bool": BOOL}
_BYTE, _NORMAL = 6, 1
_SPACE = "\u2581"
_INTERMEDIATE_SIZE = 96


def write_popular_gguf(path: Path, data: Mapping[str, Any]) -> None:
    """Writes the whole file."""
    given = {key: value for key, (_, value) in data["metadata"].items()}
    architecture = given["general.architecture"]
    special = {int(real): text for real, (text, _) in data["special_tokens"].items()}
    types: dict[str, int] = dict(data["special_tokens"].values())
    vocabulary = SmallVocabulary(special, _ordinary_tokens(data["kind"]), None)
    sizes = _sizes(architecture, given)
    metadata: dict[str, tuple[int, Any]] = {}
    for key, (kind, value) in data["metadata"].items():
        if key == "tokenizer.ggml.bos_token_id":
            metadata |= _tokens(vocabulary.tokens, types, data["kind"])
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            value = vocabulary.id_of(value)
        if key == "tokenizer.chat_template":
            value = template(str(value))
        value = sizes.get(key.removeprefix(f"{architecture}."), value)
        if key == f"{architecture}.vocab_size":
            value = len(vocabulary.tokens)
        metadata[key] = (ARRAY, (STRING, value)) if kind == "strs" else (_KINDS[kind], value)
    tensors = [
        tensor(name, draw(name, shape).astype(np.float32), Q8_0 if len(shape) > 1 else F32)
        for name, shape in _shapes(architecture, sizes, len(vocabulary.tokens), data)
    ]
    for name, factors in data.get("rope_tensors", {}).items():
        tensors.append(tensor(name, np.array(factors, np.float32)))
    path.write_bytes(file_bytes(metadata, tensors))


def _ordinary_tokens(kind: str) -> list[str]:
    if kind == "gpt2":
        return sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    return [*(f"<0x{byte:02X}>" for byte in range(256)), _SPACE, *letters]


def _tokens(tokens: list[str], types: Mapping[str, int], kind: str) -> dict[str, tuple[int, Any]]:
    def type_of(token: str) -> int:
        is_byte = token.startswith("<0x") and kind == "llama"
        return types.get(token, _BYTE if is_byte else _NORMAL)

    found: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, [type_of(token) for token in tokens])),
    }
    if kind == "gpt2":
        found["tokenizer.ggml.merges"] = (ARRAY, (STRING, []))
    else:
        scores = [-1000.0 if token in types else 0.0 for token in tokens]
        found["tokenizer.ggml.scores"] = (ARRAY, (FLOAT32, scores))
    return found


def _sizes(architecture: str, given: Mapping[str, Any]) -> dict[str, int]:
    """Small sizes, by their keys behind the architecture."""
    heads = given[f"{architecture}.attention.head_count"]
    keys = given[f"{architecture}.attention.head_count_kv"]
    small_keys = min(2, keys)
    small_heads = heads // keys * small_keys
    rotated = HEAD_DIM * 3 // 4 if architecture == "phi3" else HEAD_DIM
    has_head_dim = f"{architecture}.attention.key_length" in given
    return {
        "block_count": NUM_LAYERS["gemma3_text"] if architecture == "gemma3" else 2,
        "embedding_length": 64 if has_head_dim else HEAD_DIM * small_heads,
        "feed_forward_length": _INTERMEDIATE_SIZE,
        "attention.head_count": small_heads,
        "attention.head_count_kv": small_keys,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "rope.dimension_count": rotated,
    }


def _shapes(
    architecture: str, sizes: Mapping[str, int], num_tokens: int, data: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of tensors, and their shapes, as llama.cpp's converter writes them."""
    hidden, inner = sizes["embedding_length"], sizes["feed_forward_length"]
    queries = sizes["attention.head_count"] * HEAD_DIM
    keys = sizes["attention.head_count_kv"] * HEAD_DIM
    yield "token_embd.weight", (num_tokens, hidden)
    yield "output_norm.weight", (hidden,)
    if data.get("has_head"):
        yield "output.weight", (num_tokens, hidden)
    norms = ["attn_norm", "ffn_norm"]
    if architecture == "gemma3":
        norms += ["post_attention_norm", "post_ffw_norm"]
    for layer in range(sizes["block_count"]):
        blk = f"blk.{layer}."
        yield from ((f"{blk}{norm}.weight", (hidden,)) for norm in norms)
        if architecture in ("gemma3", "qwen3"):
            yield f"{blk}attn_q_norm.weight", (HEAD_DIM,)
            yield f"{blk}attn_k_norm.weight", (HEAD_DIM,)
        yield f"{blk}attn_output.weight", (hidden, queries)
        yield f"{blk}ffn_down.weight", (hidden, inner)
        if architecture == "phi3":
            yield f"{blk}attn_qkv.weight", (queries + 2 * keys, hidden)
            yield f"{blk}ffn_up.weight", (2 * inner, hidden)
            continue
        yield f"{blk}ffn_gate.weight", (inner, hidden)
        yield f"{blk}ffn_up.weight", (inner, hidden)
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{blk}attn_{name}.weight", (size, hidden)
            if architecture == "qwen2":
                yield f"{blk}attn_{name}.bias", (size,)
