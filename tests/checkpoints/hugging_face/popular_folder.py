"""Writes the popular checkpoints that are Hugging Face folders, small and of random weights."""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tests.checkpoints.hugging_face.family_folder import DTYPES
from tests.checkpoints.hugging_face.packed_folder import Kind, draw_matrix, pack
from tests.checkpoints.popular import HEAD_DIM, SmallVocabulary, shrink, template

_SPACE = "\u2581"
_DTYPES = {"bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}
# Of Gemma's text_config, where a file leaves them to transformers.
_DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
_DEFAULT_ROWS = 262208
_PACKED = {
    "awq": Kind("awq", group=16),
    "gptq": Kind("gptq", group=16, symmetric=True),
}


def write_popular_folder(folder: Path, data: Mapping[str, Any]) -> None:
    """Writes all files of a checkpoint."""
    special = _special_tokens(data)
    ordinary = _ordinary_tokens(data["kind"])
    config = data["config"]
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    vocabulary = SmallVocabulary(special, ordinary, rows)
    config = shrink(vocabulary.remapped(config))
    for fields in (config, config.get("text_config", {})):
        if "vocab_size" in fields:
            fields["vocab_size"] = vocabulary.num_rows
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", vocabulary.remapped(data["generation_config"]))
    settings = dict(data["tokenizer_config"])
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {
            vocabulary.id_of(int(real)): token
            for real, token in settings["added_tokens_decoder"].items()
        }
    if settings.get("chat_template"):
        settings["chat_template"] = template(settings["chat_template"])
    if data.get("wrapped_template"):
        _write(folder / "chat_template.json", {"chat_template": settings["chat_template"]})
    if "chat_template_jinja" in data:
        (folder / "chat_template.jinja").write_text(template(data["chat_template_jinja"]))
    _write(folder / "tokenizer_config.json", settings)
    if "special_tokens_map" in data:
        _write(folder / "special_tokens_map.json", data["special_tokens_map"])
    _write_tokenizer(folder, data, vocabulary, special)
    save_file(dict(_tensors(data, config)), folder / "model.safetensors")


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields))


def _special_tokens(data: Mapping[str, Any]) -> dict[int, str]:
    if "tokens" in data:
        return {int(real): token for real, token in data["tokens"].items()}
    added = data["tokenizer_config"]["added_tokens_decoder"]
    return {int(real): token["content"] for real, token in added.items()}


def _ordinary_tokens(kind: str) -> list[str]:
    if kind == "byte_level":
        return sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    return [*(f"<0x{byte:02X}>" for byte in range(256)), _SPACE, *letters]


def _write_tokenizer(
    folder: Path, data: Mapping[str, Any], vocabulary: SmallVocabulary, special: Mapping[int, str]
) -> None:
    """A tokenizer.json of the kind: a token a character, and the special ones."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    if data["kind"] == "byte_level":
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(
            models.BPE(vocab=ids, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps)
    added = data["tokenizer_config"].get("added_tokens_decoder", {})
    for real in sorted(special):
        is_special = added.get(str(real), {"special": True})["special"]
        is_special = is_special and special[real] not in data.get("plain_tokens", ())
        token = AddedToken(special[real], special=is_special, normalized=False)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
    if first := data["begins_with"]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, ids[first])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))


def _tensors(
    data: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    text = {**config, **config.get("text_config", {})}
    if text["model_type"] == "gemma3_text":
        text = {**_DEFAULTS, **text}
    dtype = _DTYPES[config.get("torch_dtype") or config["dtype"]]
    body = data.get("tensor_prefix", "model.")
    for name, shape in _shapes(text, body):
        if "packed" in data and "_proj.weight" in name:
            stem, kind = name.removesuffix(".weight"), _PACKED[data["packed"]]
            yield from pack(kind, stem, draw_matrix(kind, name, (shape[0], shape[1]))).items()
            if "empty_biases" in data and not stem.endswith(("q_proj", "k_proj", "v_proj")):
                yield f"{stem}.bias", np.zeros(shape[0], dtype)
        else:
            yield name, draw(name, shape).astype(dtype)
    for name in data.get("image_tensors", ()):
        yield name, np.ones(3, dtype)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers, near 1 for a norm."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return normal * 0.2 + ("norm" in name)


def _shapes(config: Mapping[str, Any], body: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of the text model's tensors, and their shapes, as transformers writes them."""
    family, hidden = config["model_type"], config["hidden_size"]
    rows, is_gemma = config.get("vocab_size", _DEFAULT_ROWS), family == "gemma3_text"
    yield f"{body}embed_tokens.weight", (rows, hidden)
    yield f"{body}norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", is_gemma):
        yield "lm_head.weight", (rows, hidden)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if is_gemma:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    head_dim = config.get("head_dim") or HEAD_DIM
    for layer in range(config["num_hidden_layers"]):
        prefix = f"{body}layers.{layer}."
        for norm in norms:
            yield f"{prefix}{norm}.weight", (hidden,)
        if is_gemma or family == "qwen3":
            yield f"{prefix}self_attn.q_norm.weight", (head_dim,)
            yield f"{prefix}self_attn.k_norm.weight", (head_dim,)
        for name, shape in _matrices(config, head_dim):
            yield f"{prefix}{name}.weight", shape
            if family == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
                yield f"{prefix}{name}.bias", shape[:1]


def _matrices(config: Mapping[str, Any], head_dim: int) -> Iterator[tuple[str, tuple[int, int]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    yield "self_attn.o_proj", (hidden, queries)
    if config["model_type"] == "phi3":
        yield "self_attn.qkv_proj", (queries + 2 * keys, hidden)
        yield "mlp.gate_up_proj", (2 * inner, hidden)
        yield "mlp.down_proj", (hidden, inner)
        return
    yield "self_attn.q_proj", (queries, hidden)
    yield "self_attn.k_proj", (keys, hidden)
    yield "self_attn.v_proj", (keys, hidden)
    if config["model_type"] == "mixtral":
        yield "block_sparse_moe.gate", (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            experts = f"block_sparse_moe.experts.{expert}"
            yield from ((f"{experts}.{w}", (inner, hidden)) for w in ("w1", "w3"))
            yield f"{experts}.w2", (hidden, inner)
        return
    yield "mlp.gate_proj", (inner, hidden)
    yield "mlp.up_proj", (inner, hidden)
    yield "mlp.down_proj", (hidden, inner)
