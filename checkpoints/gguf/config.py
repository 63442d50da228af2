"""A GGUF file's words about its model, as the fields that a ``config.json`` would have.

The families read those (jaxinfer/models); here is only what the two formats call differently, and
what llama.cpp takes for granted.
"""

import math
from collections.abc import Iterator
from typing import Any

from checkpoints.gguf.metadata import metadata_value
from checkpoints.gguf.rope import rope_fields, with_attention_factor
from checkpoints.gguf.settings import Settings
from checkpoints.gguf.split import GGUFFiles
from checkpoints.tensor_names import GGUF_MODEL
from jaxinfer.config import ModelConfig
from jaxinfer.models import GGUF_ARCHITECTURES, read_config
from jaxinfer.models.fields import MAX_LAYERS, MAX_SIZE

# Gemma 3 27B divides scores by another root than all other sizes; a file does not say so.
_GEMMA_3_27B_LAYERS = 62
# Families whose GGUF files may have windows; llama.cpp reads none for the others.
_WITH_WINDOWS = ("gemma3_text", "mixtral", "phi3")


def read_model(file: GGUFFiles) -> ModelConfig:
    """The model of a file. Raises ``ValueError`` for one that is not supported or cannot be."""
    architecture = metadata_value(file.metadata, "general.architecture", str)
    if architecture not in GGUF_ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r:.80} is not supported; "
            f"supported are {', '.join(sorted(GGUF_ARCHITECTURES))}"
        )
    settings = Settings(file.metadata, architecture)
    fields = dict(_Reader(file, settings, GGUF_ARCHITECTURES[architecture]).fields())
    model = with_attention_factor(read_config(fields), settings)
    _check_scores(model, settings)
    settings.refuse_rest()
    return model


def _check_scores(model: ModelConfig, settings: Settings) -> None:
    """Scores are divided by the root that a file says, if it says one: 0 is the usual."""
    divisor = model.query_pre_attn_scalar or model.head_dim
    settings.expect("attention.scale", float, 0.0, 1 / math.sqrt(divisor))


class _Reader:
    """Settings of one architecture as fields of ``model_type``."""

    def __init__(self, file: GGUFFiles, settings: Settings, model_type: str) -> None:
        self._file, self._settings, self._model_type = file, settings, model_type

    def fields(self) -> Iterator[tuple[str, Any]]:
        """Fields of a ``config.json``, a later one instead of an earlier one of its name."""
        embedding = self._file.tensors.get(GGUF_MODEL["embed_tokens"])
        if embedding is None:
            raise ValueError(f"tensor {GGUF_MODEL['embed_tokens']!r} is missing")
        num_experts = self._settings.get("expert_count", int, 0)
        if self._model_type == "llama" and num_experts:
            self._model_type = "mixtral"
        yield "model_type", self._model_type
        yield "vocab_size", embedding.shape[0]
        yield "tie_word_embeddings", GGUF_MODEL["lm_head"] not in self._file.tensors
        yield from self._sizes()
        if num_experts:
            yield from self._experts(num_experts)
        yield from self._window()
        if self._model_type == "gemma3_text":
            yield from self._gemma()

    def _sizes(self) -> Iterator[tuple[str, Any]]:
        get = self._settings.get
        hidden_size = get("embedding_length", int)
        num_heads = get("attention.head_count", int)
        if not 1 <= num_heads <= hidden_size:
            raise ValueError(
                f"{self._settings.key('attention.head_count')} must be in [1, {hidden_size}], "
                f"got {num_heads}"
            )
        context, num_layers = get("context_length", int), get("block_count", int)
        if context > MAX_SIZE:
            raise ValueError(
                f"{self._settings.key('context_length')} is {context}, more than {MAX_SIZE}"
            )
        if num_layers > len(self._file.tensors):
            raise ValueError(
                f"{self._settings.key('block_count')} is {num_layers}, but the file has only "
                f"{len(self._file.tensors)} tensors"
            )
        yield "hidden_size", hidden_size
        yield "num_attention_heads", num_heads
        yield "num_key_value_heads", get("attention.head_count_kv", int, num_heads)
        yield "intermediate_size", get("feed_forward_length", int)
        yield "num_hidden_layers", num_layers
        yield "max_position_embeddings", context
        yield "rms_norm_eps", get("attention.layer_norm_rms_epsilon", float)
        self._settings.expect("embedding_length_out", int, 0, hidden_size)
        yield from self._heads(hidden_size // num_heads)
        yield from rope_fields(self._file, self._settings, context)

    def _heads(self, default: int) -> Iterator[tuple[str, Any]]:
        """Sizes of heads: the same in all layers, those with a window too."""
        settings = self._settings
        head_dim = settings.get("attention.key_length", int, default)
        for name in ("value_length", "key_length_swa", "value_length_swa"):
            settings.expect(f"attention.{name}", int, head_dim)
        yield "head_dim", head_dim
        rotated = head_dim
        if self._model_type == "phi3":
            rotated = settings.get("rope.dimension_count", int, head_dim)
            if not 2 <= rotated <= head_dim:
                raise ValueError(
                    f"{settings.key('rope.dimension_count')} must be in [2, {head_dim}], "
                    f"got {rotated}"
                )
            yield "partial_rotary_factor", rotated / head_dim
        for name in ("rope.dimension_count", "rope.dimension_count_swa"):
            settings.expect(name, int, rotated)

    def _window(self) -> Iterator[tuple[str, Any]]:
        settings, name = self._settings, "attention.sliding_window"
        if not settings.has(name):
            return
        window = settings.get(name, int)
        if self._model_type in _WITH_WINDOWS:
            yield "sliding_window", window or None
            return
        if window < 0 or 0 < window < settings.get("context_length", int):
            raise ValueError(
                f"{settings.key(name)} is {window}, which is not supported for a "
                f"{self._model_type} model"
            )

    def _experts(self, num_experts: int) -> Iterator[tuple[str, Any]]:
        get = self._settings.get
        is_mixtral = self._model_type == "mixtral"
        yield "num_local_experts" if is_mixtral else "num_experts", num_experts
        yield "num_experts_per_tok", get("expert_used_count", int)
        # Older files of Mixtral do not tell the two sizes apart.
        ffn = get("feed_forward_length", int)
        yield "moe_intermediate_size", get("expert_feed_forward_length", int, ffn)
        yield "norm_topk_prob", True

    def _gemma(self) -> Iterator[tuple[str, Any]]:
        get = self._settings.get
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            yield name, get(name, float, 0.0) or None  # 0 is off
        heads, hidden_size = (
            get(name, int) for name in ("attention.head_count", "embedding_length")
        )
        head_dim = get("attention.key_length", int, hidden_size // heads)
        is_27b = get("block_count", int) == _GEMMA_3_27B_LAYERS
        yield "query_pre_attn_scalar", hidden_size / heads if is_27b else head_dim
        yield "rope_local_base_freq", get("rope.freq_base_swa", float, 10000.0)
        pattern = "attention.sliding_window_pattern"
        has_window = self._settings.array(pattern)
        if has_window is not None:
            yield "layer_types", _layer_types(has_window.tolist())
        elif self._settings.has(pattern):
            yield "sliding_window_pattern", get(pattern, int)


def _layer_types(has_window: list[Any]) -> list[str]:
    """Names the kinds of layers, of which a file says if they have a window."""
    kinds = "full_attention", "sliding_attention"
    return [kinds[bool(one)] for one in has_window[: MAX_LAYERS + 1]]
