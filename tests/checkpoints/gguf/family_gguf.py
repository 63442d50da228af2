"""Writes the small random models of every family as GGUF files, with gguf-py.

Names of tensors and keys are gguf-py's own; the rest is what llama.cpp's convert_hf_to_gguf.py does
for each architecture.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxinfer.models import GGUF_ARCHITECTURES
from tests.data.random_family import draw
from tests.jaxinfer.models.random_checkpoint import CASES

# Families that say "llama" in GGUF.
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama"}
ARCHITECTURES |= {model_type: name for name, model_type in GGUF_ARCHITECTURES.items()}


def write_gguf(
    path: Path,
    case: str,
    kind: gguf.GGMLQuantizationType,
    tensors_per_shard: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """A file with the tensors of ``case``, matrices quantized to ``kind``, and no tokenizer.

    With ``tensors_per_shard`` several, ``NAME-00001-of-0000N.gguf`` for ``NAME.gguf``.
    ``settings``: further ones of the architecture.
    """
    config = CASES[case]["config"]
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_shard)
    _add_config(writer, config)
    for name, value in (settings or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{architecture}.{name}", value)
    (number,) = (n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    for name, tensor in _tensors(case, config, architecture).items():
        if name.startswith("rope_factors"):
            gguf_name = name
        else:
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert gguf_name, name
        own = kind_of(tensor, kind)
        data = gguf.quants.quantize(tensor, own)
        writer.add_tensor(gguf_name, data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def kind_of(tensor: np.ndarray, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """``kind``, or F32 for a vector and where rows are not of whole blocks."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    whole = tensor.ndim > 1 and tensor.shape[-1] % block == 0
    return kind if whole else gguf.GGMLQuantizationType.F32


def _add_config(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(np.sqrt(1 + np.log(scale) / np.log(original)))
    if config.get("sliding_window") and config["model_type"] in ("gemma3_text", "phi3"):
        writer.add_sliding_window(config["sliding_window"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _tensors(case: str, config: Mapping[str, Any], architecture: str) -> dict[str, np.ndarray]:
    """By Hugging Face's names, experts stacked."""
    tensors, experts = {}, {}
    for name, shape in CASES[case]["tensors"].items():
        tensor = draw(case, name, tuple(shape))
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        if architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
            head_dim = config.get(
                "head_dim", config["hidden_size"] // config["num_attention_heads"]
            )
            halves = tensor.reshape(-1, 2, head_dim // 2, shape[1])
            tensor = halves.swapaxes(1, 2).reshape(shape)
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name):
            before, number, after = found.groups()
            experts.setdefault(f"{before}.{after}", {})[int(number)] = tensor
        else:
            tensors[name] = tensor
    for name, stack in experts.items():
        # The converter's name for what Mixtral calls w1, w2 and w3.
        name = re.sub(r"model\.(.*)\.block_sparse_moe", r"\1.feed_forward", name)
        tensors[name] = np.stack([stack[number] for number in range(len(stack))])
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            factors = np.array(rope[f"{kind}_factor"], np.float32)
            tensors[f"rope_factors_{kind}.weight"] = factors
    return tensors
