"""Gemma 3's text models (Gemma Team 2025): norms before and after, local and global layers.

Of the models that see images too, the text part.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.config import DtypePolicy, LayerType, ModelConfig
from jaxinfer.models import layers
from jaxinfer.models.attention import Attention, AttentionKind
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.family import Family
from jaxinfer.models.feed_forward import GatedMLP
from jaxinfer.models.fields import (
    Fields,
    common_fields,
    rope_scaling,
    served_context,
    window_fields,
)
from jaxinfer.models.rotary import RopeTables
from jaxinfer.weights import MatrixPath
from pallas_kernels.ragged_paged_attention import KVPages, RaggedBatch


class SandwichLayer(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    norms: ClassVar[Mapping[MatrixPath, str]] = {
        ("attention", "qkv"): "input_norm",
        ("mlp", "gate_up"): "pre_feedforward_norm",
    }

    def __init__(self, model: ModelConfig, attention: Attention, mlp: GatedMLP) -> None:
        self.epsilon = model.rms_norm_eps
        self.input_norm = layers.norm_scale(model.hidden_size)
        self.attention = attention
        self.post_attention_norm = layers.norm_scale(model.hidden_size)
        self.pre_feedforward_norm = layers.norm_scale(model.hidden_size)
        self.mlp = mlp
        self.post_feedforward_norm = layers.norm_scale(model.hidden_size)

    def __call__(
        self, x: jax.Array, rope: RopeTables, kv_pages: KVPages, batch: RaggedBatch
    ) -> tuple[jax.Array, KVPages]:
        """[T, E] -> [T, E] and the pages with this step's keys and values in them."""
        normed = layers.rms_norm(x, self.input_norm[...], self.epsilon)
        attended, kv_pages = self.attention(normed, rope, kv_pages, batch)
        x = x + layers.rms_norm(attended, self.post_attention_norm[...], self.epsilon)
        normed = layers.rms_norm(x, self.pre_feedforward_norm[...], self.epsilon)
        fed = self.mlp(normed)
        return x + layers.rms_norm(fed, self.post_feedforward_norm[...], self.epsilon), kv_pages


class Gemma3(Decoder):
    """Embeddings scaled by the root of their size, sandwiched layers, tanh GeGLU."""

    def __init__(
        self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs, mesh: Mesh | None
    ) -> None:
        gelu = functools.partial(jax.nn.gelu, approximate=True)

        def make_layer(physical: ModelConfig, layer: int) -> SandwichLayer:
            window = model.window(layer)
            attention = Attention(
                physical, dtypes, rngs, mesh, AttentionKind(window=window, has_qk_norm=True)
            )
            return SandwichLayer(physical, attention, GatedMLP(physical, dtypes, rngs, gelu))

        super().__init__(model, dtypes, rngs, mesh, make_layer, math.sqrt(model.hidden_size))


# What a config.json leaves out is as in transformers' Gemma3TextConfig.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


def read_config(fields: Fields) -> ModelConfig:
    """A Gemma 3, or the text part of one that sees images."""
    fields.expect("attention_bias", False)
    fields.expect("use_bidirectional_attention", False)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        fields.expect(name)
    fields = fields.with_defaults(_DEFAULTS)
    common = common_fields(fields, activation="gelu_pytorch_tanh")
    common["architecture"] = "gemma3_text"
    theta = fields.number("rope_local_base_freq")
    if fields.has("rope_parameters"):
        # One rule for each kind of layer.
        rope = fields.fields("rope_parameters")
        whole, local = rope.fields("full_attention"), rope.fields("sliding_attention")
        local.expect("rope_type", "default")
        theta = local.number("rope_theta", theta)
        common["rope_theta"] = whole.number("rope_theta", common["rope_theta"])
        common["rope_scaling"] = rope_scaling(whole, fields)
        common["max_position_embeddings"] = served_context(fields, common["rope_scaling"])
    windows = window_fields(fields, common["num_hidden_layers"])
    if not fields.has("layer_types"):
        windows["layer_types"] = _layer_types(fields, common["num_hidden_layers"])
    return ModelConfig(
        **common,
        **windows,
        local_rope_theta=theta,
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar"),
    )


def _layer_types(fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
    """Every sixth layer sees everything, unless the pattern is another."""
    pattern = fields.integer("sliding_window_pattern", 6)
    return tuple(
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
        for layer in range(num_layers)
    )


FAMILY = Family(
    Gemma3,
    read_config,
    gguf={
        "post_attention_norm.weight": ("post_attention_norm",),
        "ffn_norm.weight": ("pre_feedforward_norm",),
    },
    norm_offset=1.0,
)
