"""Writes small GGUF files, sound ones and others, for the tests of the reader."""

import struct
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from tests.data.random_llama import draw_weights

UINT8, INT32, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 5, 4, 6, 7, 8, 9, 10
UINT16 = 2
_FORMATS = {
    UINT8: "<B",
    UINT16: "<H",
    INT32: "<i",
    UINT32: "<I",
    FLOAT32: "<f",
    BOOL: "<?",
    UINT64: "<Q",
}

# GGML's numbers of tensor types.
F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30

CONFIG: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}

_GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "post_attention_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def pack(kind: int, value: Any) -> bytes:
    """Returns a metadata value; an array's value is its element kind and its elements."""
    if kind == STRING:
        data = value if isinstance(value, bytes) else value.encode()
        return struct.pack("<Q", len(data)) + data
    if kind == ARRAY:
        element_kind, elements = value
        packed = b"".join(pack(element_kind, element) for element in elements)
        return struct.pack("<IQ", element_kind, len(elements)) + packed
    return struct.pack(_FORMATS[kind], value)


def tensor(
    name: str, array: np.ndarray, number: int = F32
) -> tuple[str, tuple[int, ...], int, bytes]:
    """Returns a tensor quantized by gguf-py."""
    data = gguf.quants.quantize(array, gguf.GGMLQuantizationType(number))
    return name, array.shape, number, data.tobytes()


def file_bytes(
    metadata: Mapping[str, tuple[int, Any]],
    tensors: list[tuple[str, tuple[int, ...], int, bytes]],
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Returns a whole file; ``tensors`` are name, shape (numpy's order), type number and bytes."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        header += pack(STRING, key) + struct.pack("<I", kind) + pack(kind, value)
    data = b""
    for name, shape, number, content in tensors:
        data += bytes(-len(data) % alignment)
        header += pack(STRING, name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", number, len(data))
        data += content
    return header + bytes(-len(header) % alignment) + data


def llama_metadata(config: Mapping[str, Any] = CONFIG) -> dict[str, tuple[int, Any]]:
    """Returns the metadata of a Llama with a tokenizer of a few tokens."""
    tokens = ["<|end|>", "<|start|>", "<tool>", *"abc12", "ab", "abc", "Ġ", "12"]
    return {
        "general.architecture": (STRING, "llama"),
        "llama.block_count": (UINT32, config["num_hidden_layers"]),
        "llama.context_length": (UINT32, 128),
        "llama.embedding_length": (UINT32, config["hidden_size"]),
        "llama.feed_forward_length": (UINT32, config["intermediate_size"]),
        "llama.attention.head_count": (UINT32, config["num_attention_heads"]),
        "llama.attention.head_count_kv": (UINT32, config["num_key_value_heads"]),
        "llama.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        "llama.rope.freq_base": (FLOAT32, 50000.0),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, [3, 3, 4] + [1] * 9)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b", "ab c", "1 2"])),
        "tokenizer.ggml.bos_token_id": (UINT32, 1),
        "tokenizer.ggml.eos_token_id": (UINT32, 0),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
        "tokenizer.chat_template": (STRING, "{{ messages[0]['content'] }}"),
    }


def llama_tensors(
    weights: Mapping[str, np.ndarray], config: Mapping[str, Any] = CONFIG, number: int = F32
) -> list[tuple[str, tuple[int, ...], int, bytes]]:
    """Returns ``weights`` by GGUF names, Q and K permuted, matrices in type ``number``."""
    tensors = []
    for name, array in weights.items():
        *layer, part = name.split(".")
        if part in ("q", "k"):
            # llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute.
            pairs = array.reshape(-1, 2, config["head_dim"] // 2, array.shape[1])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        prefix = f"blk.{layer[1]}." if layer else ""
        kind = number if array.ndim == 2 else F32
        tensors.append(tensor(f"{prefix}{_GGUF_NAMES[part]}.weight", array, kind))
    return tensors


def llama_bytes(number: int = F32, **metadata: Any) -> bytes:
    """Returns a sound tiny Llama; ``metadata`` replaces or, when None, removes keys.

    In a key, a double underscore stands for a dot.
    """
    merged: dict[str, tuple[int, Any] | None] = {**llama_metadata()}
    merged |= {key.replace("__", "."): value for key, value in metadata.items()}
    kept = {key: value for key, value in merged.items() if value is not None}
    return file_bytes(kept, llama_tensors(draw_weights(CONFIG, seed=3), number=number))
