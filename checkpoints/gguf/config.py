"""A GGUF file's words about its model, as the fields that a ``config.json`` would have.

The families read those (jaxinfer/models); here is only what the two formats call differently, and
what llama.cpp takes for granted.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from checkpoints.gguf.blocks import dequantize_rows
from checkpoints.gguf.metadata import metadata_value
from checkpoints.gguf.split import GGUFFiles
from checkpoints.tensor_names import GGUF_MODEL
from jaxinfer.config import ModelConfig
from jaxinfer.models import GGUF_ARCHITECTURES, read_config
from jaxinfer.models.fields import MAX_SIZE

# Tensors with divisors of rotary frequencies: part of the configuration, not of the parameters.
ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
ROPE_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)

# Gemma 3 27B divides scores by another root than all other sizes; a file does not say so.
_GEMMA_3_27B_LAYERS = 62


def read_model(file: GGUFFiles) -> ModelConfig:
    """The model of a file. Raises ``ValueError`` for one that is not supported or cannot be."""
    architecture = metadata_value(file.metadata, "general.architecture", str)
    if architecture not in GGUF_ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r:.80} is not supported; "
            f"supported are {', '.join(sorted(GGUF_ARCHITECTURES))}"
        )
    return read_config(dict(_Reader(file, architecture).fields()))


class _Reader:
    """Keys of one architecture."""

    def __init__(self, file: GGUFFiles, architecture: str) -> None:
        self._file, self._architecture = file, architecture

    def fields(self) -> Iterator[tuple[str, Any]]:
        """Fields of a ``config.json``, a later one instead of an earlier one of its name."""
        embedding = self._file.tensors.get(GGUF_MODEL["embed_tokens"])
        if embedding is None:
            raise ValueError(f"tensor {GGUF_MODEL['embed_tokens']!r} is missing")
        num_experts = self._get("expert_count", int, 0)
        model_type = GGUF_ARCHITECTURES[self._architecture]
        if model_type == "llama" and num_experts:
            model_type = "mixtral"
        yield "model_type", model_type
        yield "vocab_size", embedding.shape[0]
        yield "tie_word_embeddings", GGUF_MODEL["lm_head"] not in self._file.tensors
        yield from self._sizes()
        if num_experts:
            yield from self._experts(num_experts)
        if self._has("attention.sliding_window"):
            yield "sliding_window", self._get("attention.sliding_window", int) or None
        if model_type == "gemma3_text":
            yield from self._gemma()

    def _sizes(self) -> Iterator[tuple[str, Any]]:
        hidden_size = self._get("embedding_length", int)
        num_heads = self._get("attention.head_count", int)
        if not 1 <= num_heads <= hidden_size:
            raise ValueError(
                f"{self._architecture}.attention.head_count must be in [1, {hidden_size}], "
                f"got {num_heads}"
            )
        head_dim = self._get("attention.key_length", int, hidden_size // num_heads)
        self._expect("attention.value_length", head_dim)
        context = self._get("context_length", int)
        if context > MAX_SIZE:
            raise ValueError(
                f"{self._architecture}.context_length is {context}, more than {MAX_SIZE}"
            )
        num_layers = self._get("block_count", int)
        if num_layers > len(self._file.tensors):
            raise ValueError(
                f"{self._architecture}.block_count is {num_layers}, but the file has only "
                f"{len(self._file.tensors)} tensors"
            )
        yield "hidden_size", hidden_size
        yield "num_attention_heads", num_heads
        yield "num_key_value_heads", self._get("attention.head_count_kv", int, num_heads)
        yield "head_dim", head_dim
        yield "intermediate_size", self._get("feed_forward_length", int)
        yield "num_hidden_layers", num_layers
        yield "max_position_embeddings", context
        yield "rms_norm_eps", self._get("attention.layer_norm_rms_epsilon", float)
        yield "rope_theta", self._get("rope.freq_base", float, 10000.0)
        yield from self._rotation(head_dim, context)

    def _rotation(self, head_dim: int, context: int) -> Iterator[tuple[str, Any]]:
        if GGUF_ARCHITECTURES[self._architecture] == "phi3":
            rotated = self._get("rope.dimension_count", int, head_dim)
            if not 2 <= rotated <= head_dim:
                raise ValueError(
                    f"{self._architecture}.rope.dimension_count must be in [2, {head_dim}], "
                    f"got {rotated}"
                )
            yield "partial_rotary_factor", rotated / head_dim
        else:
            self._expect("rope.dimension_count", head_dim)
        original = self._get("rope.scaling.original_context_length", int, 0)
        yield "original_max_position_embeddings", original or context
        yield "rope_scaling", self._rope_scaling(original)

    def _rope_scaling(self, original: int) -> dict[str, Any] | None:
        key = f"{self._architecture}.rope.scaling"
        kind = self._get("rope.scaling.type", str, "linear")
        if kind not in ("none", "linear", "yarn", "longrope"):
            raise ValueError(
                f"{key}.type is {kind!r:.40}; supported are none, linear, yarn and longrope"
            )
        factor = self._get("rope.scaling.factor", float, 1.0) if kind in ("linear", "yarn") else 1.0
        if factor == 0:  # llama.cpp's way to say that there is none
            factor = 1.0
        if factor < 0:
            raise ValueError(f"{key}.factor must be positive, got {factor}")
        if LONG_FACTORS in self._file.tensors:
            return {
                "rope_type": "longrope",
                "long_factor": self._factors(LONG_FACTORS),
                "short_factor": self._factors(SHORT_FACTORS),
                "attention_factor": self._get("rope.scaling.attn_factor", float, 1.0),
            }
        if ROPE_FACTORS in self._file.tensors:
            if factor != 1:
                raise ValueError(f"both {key}.factor and {ROPE_FACTORS}; one is supported")
            return {"rope_type": "factors", "factors": self._factors(ROPE_FACTORS)}
        if factor == 1:
            return None
        if kind == "yarn" and not original:
            raise ValueError(f"metadata key '{key}.original_context_length' is missing")
        return {"rope_type": kind, "factor": factor}

    def _factors(self, name: str) -> list[float]:
        if name not in self._file.tensors:
            raise ValueError(f"tensor {name!r} is missing")
        data = self._file.tensor_bytes(name)
        factors = dequantize_rows(data, self._file.tensors[name].type).reshape(-1)
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise ValueError(f"{name} must hold positive, finite numbers")
        return factors.tolist()

    def _experts(self, num_experts: int) -> Iterator[tuple[str, Any]]:
        yield "num_local_experts", num_experts
        yield "num_experts", num_experts
        yield "num_experts_per_tok", self._get("expert_used_count", int)
        # Older files of Mixtral do not tell the two sizes apart.
        ffn = self._get("feed_forward_length", int)
        yield "moe_intermediate_size", self._get("expert_feed_forward_length", int, ffn)
        yield "norm_topk_prob", True

    def _gemma(self) -> Iterator[tuple[str, Any]]:
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if self._has(name):
                yield name, self._get(name, float)
        heads, hidden_size = (
            self._get(name, int) for name in ("attention.head_count", "embedding_length")
        )
        head_dim = self._get("attention.key_length", int, hidden_size // heads)
        is_27b = self._get("block_count", int) == _GEMMA_3_27B_LAYERS
        yield "query_pre_attn_scalar", hidden_size / heads if is_27b else head_dim
        yield "rope_local_base_freq", self._get("rope.freq_base_swa", float, 10000.0)

    def _has(self, name: str) -> bool:
        return f"{self._architecture}.{name}" in self._file.metadata

    def _get[T: (int, float, str, bool)](
        self, name: str, kind: type[T], default: T | None = None
    ) -> T:
        return metadata_value(self._file.metadata, f"{self._architecture}.{name}", kind, default)

    def _expect(self, name: str, expected: int) -> None:
        value = self._get(name, int, expected)
        if value != expected:
            raise ValueError(
                f"{self._architecture}.{name} is {value}; only {expected} is supported here"
            )
