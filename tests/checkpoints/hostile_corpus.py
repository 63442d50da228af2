"""Sound checkpoints of a few kilobytes, whose files are then damaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from checkpoints.converted.convert import convert
from checkpoints.load import open_checkpoint
from checkpoints.parameters import tensor_shapes
from checkpoints.tensor_names import HUGGING_FACE_LAYER, HUGGING_FACE_MODEL, tensor_places
from jaxinfer.models import declared_parameters, family, read_config
from tests.checkpoints.gguf import tiny_gguf
from tests.checkpoints.gguf.tiny_gguf import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    Q4_0,
    STRING,
    UINT16,
    UINT32,
)
from tests.checkpoints.hugging_face.family_folder import write_tokenizer
from tests.checkpoints.hugging_face.packed_folder import GPTQ, write_packed

TEMPLATE = "{% for m in messages %}{{ m['role'] + m.content | trim }}{% endfor %}"
_SIZES: dict[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
_CONFIG: dict[str, Any] = {
    **_SIZES,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": [95, 3],
    "sliding_window": 16,
    "use_sliding_window": True,
    "max_window_layers": 1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.01,
    "repetition_penalty": 1.05,
    "eos_token_id": [95],
}


def write_sentence_piece_llama(path: Path) -> None:
    """A Llama with a tokenizer of SentencePiece's kind, with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"ab12", "ab", "\u2581a", "\u2581ab", "<0x41>"]
    metadata = _metadata("llama") | {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, pieces)),
        "tokenizer.ggml.scores": (ARRAY, (FLOAT32, [-float(i) for i in range(12)])),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, [2, 3, 3, *[1] * 8, 6])),
        "tokenizer.ggml.bos_token_id": (UINT32, 1),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
        "tokenizer.ggml.unknown_token_id": (UINT32, 0),
        "tokenizer.ggml.add_space_prefix": (BOOL, True),
        "llama.rope.scaling.type": (STRING, "linear"),
        "llama.rope.scaling.factor": (FLOAT32, 2.0),
    }
    del metadata["tokenizer.ggml.merges"], metadata["tokenizer.ggml.pre"]
    path.write_bytes(tiny_gguf.file_bytes(metadata, _dense()))


def write_byte_level_qwen2(path: Path) -> None:
    """A Qwen2, with biases, and a byte-level tokenizer."""
    metadata = _metadata("qwen2") | {"tokenizer.ggml.pre": (STRING, "qwen2")}
    path.write_bytes(tiny_gguf.file_bytes(metadata, [*_dense(), *_biases()]))


def write_mixture(path: Path) -> None:
    """A Qwen3-MoE."""
    path.write_bytes(tiny_gguf.file_bytes(_mixture_metadata(), _mixture()))


def write_split_mixture(folder: Path) -> None:
    """The same, in three shards ``tiny-0000N-of-00003.gguf``."""
    tensors = _mixture()
    for number in range(3):
        own = {
            "split.no": (UINT16, number),
            "split.count": (UINT16, 3),
            "split.tensors.count": (INT32, len(tensors)),
        }
        metadata = own | (_mixture_metadata() if number == 0 else {})
        path = folder / f"tiny-{number + 1:05}-of-00003.gguf"
        path.write_bytes(tiny_gguf.file_bytes(metadata, tensors[number::3]))


def write_folder(folder: Path, has_experts: bool = False, num_files: int = 1) -> None:
    """A folder as on the Hugging Face hub: a Qwen3, a byte-level tokenizer, default sampling."""
    folder.mkdir()
    config = _CONFIG | {"model_type": "qwen3_moe" if has_experts else "qwen3"}
    config |= _EXPERTS if has_experts else {}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = _hugging_face_tensors(config)
    placed: dict[str, str] = {}
    for number in range(num_files):
        part = dict(list(tensors.items())[number::num_files])
        name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        save_file(part, folder / (name if num_files > 1 else "model.safetensors"))
        placed |= dict.fromkeys(part, name)
    if num_files > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, _SIZES["vocab_size"])
    settings = {
        "bos_token": {"content": "a", "special": False},
        "eos_token": "<|end|>",
        "chat_template": [{"name": "default", "template": TEMPLATE}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(_GENERATION))


def write_sentence_piece_folder(folder: Path) -> None:
    """The same with a tokenizer.json as Llama 2 and Gemma have it, and a chat_template.jinja."""
    write_folder(folder)
    vocab = {"<unk>": 0, "<s>": 1, "\u2581": 2, "a": 3, "b": 4, "ab": 5, "<0x41>": 6, "1": 7}
    model = models.BPE(vocab, [("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"), normalizers.NFC()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_previous")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "<unk>", AddedToken("<|x|>", rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_packed_folder(folder: Path) -> None:
    """A Mistral packed as GPTQ does it, with groups of inputs that are apart in one matrix."""
    groups_of = np.arange(96, dtype=np.int32) % 3
    name = "model.layers.0.self_attn.q_proj.g_idx"
    write_packed(folder, "mistral_window_20", GPTQ, tensors={name: groups_of})
    write_tokenizer(folder, 97)


def write_converted(folder: Path) -> None:
    """Writes what convert.py makes of a Qwen2."""
    source = folder.with_name("converted.gguf")
    write_byte_level_qwen2(source)
    checkpoint = open_checkpoint(source)
    convert(checkpoint, folder, np.dtype(np.float32), {"source": "test"})  # pyright: ignore


def _hugging_face_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    model = read_config(config)
    shapes = tensor_shapes(declared_parameters(model))
    own = family(model.architecture).hugging_face
    places = tensor_places(
        shapes, HUGGING_FACE_MODEL, HUGGING_FACE_LAYER, own, "model.layers.{layer}."
    )
    random = np.random.RandomState(0)
    return {
        name: random.standard_normal(place.shape).astype(np.float16)
        for place in places.values()
        for name in place.names
    }


def _metadata(architecture: str) -> dict[str, tuple[int, Any]]:
    metadata = {
        key.replace("llama.", f"{architecture}."): value
        for key, value in tiny_gguf.llama_metadata(_SIZES).items()
    }
    return metadata | {
        "general.architecture": (STRING, architecture),
        f"{architecture}.attention.key_length": (UINT32, _SIZES["head_dim"]),
        "tokenizer.chat_template": (STRING, TEMPLATE),
    }


def _mixture_metadata() -> dict[str, tuple[int, Any]]:
    metadata = _metadata("qwen3moe")
    del metadata["tokenizer.chat_template"]  # to compile it takes as long as all the rest
    return metadata | {
        "qwen3moe.expert_count": (UINT32, _EXPERTS["num_experts"]),
        "qwen3moe.expert_used_count": (UINT32, _EXPERTS["num_experts_per_tok"]),
        "qwen3moe.expert_feed_forward_length": (UINT32, _EXPERTS["moe_intermediate_size"]),
    }


Tensor = tuple[str, tuple[int, ...], int, bytes]


def _drawn(name: str, *shape: int) -> Tensor:
    array = np.random.RandomState(len(name)).standard_normal(shape).astype(np.float32)
    number = tiny_gguf.F32 if len(shape) == 1 else Q4_0
    return tiny_gguf.tensor(f"{name}.weight", np.abs(array), number)


def _attention(layer: int) -> list[Tensor]:
    # Embed 32, two query heads and one of keys and values of 16.
    prefix = f"blk.{layer}."
    return [
        _drawn(prefix + "attn_norm", 32),
        _drawn(prefix + "attn_q", 32, 32),
        _drawn(prefix + "attn_k", 16, 32),
        _drawn(prefix + "attn_v", 16, 32),
        _drawn(prefix + "attn_output", 32, 32),
        _drawn(prefix + "ffn_norm", 32),
    ]


def _ends() -> list[Tensor]:
    return [_drawn("token_embd", 104, 32), _drawn("output_norm", 32), _drawn("output", 104, 32)]


def _dense() -> list[Tensor]:
    tensors = _ends()
    for layer in range(2):
        tensors += _attention(layer)
        tensors += [_drawn(f"blk.{layer}.ffn_{part}", 32, 32) for part in ("gate", "up", "down")]
    return tensors


def _biases() -> list[Tensor]:
    sizes = {"q": 32, "k": 16, "v": 16}
    return [
        tiny_gguf.tensor(f"blk.{layer}.attn_{part}.bias", np.ones(size, np.float32))
        for layer in range(2)
        for part, size in sizes.items()
    ]


def _mixture() -> list[Tensor]:
    tensors = _ends()
    for layer in range(2):
        prefix = f"blk.{layer}."
        tensors += _attention(layer)
        tensors += [_drawn(f"{prefix}attn_{part}_norm", 16) for part in "qk"]
        tensors.append(_drawn(prefix + "ffn_gate_inp", 4, 32))
        tensors += [
            _drawn(f"{prefix}ffn_{part}_exps", 4, 32, 32) for part in ("gate", "up", "down")
        ]
    return tensors
