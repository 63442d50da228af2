"""Qwen2 and Qwen2.5: a Llama whose queries, keys and values have biases (Yang et al. 2024)."""

from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.models.attention import Attention, AttentionKind
from jaxinfer.models.decoder import Decoder, PreNormLayer
from jaxinfer.models.family import Family
from jaxinfer.models.feed_forward import GatedMLP
from jaxinfer.models.fields import Fields, common_fields, uses_windows, window_fields


class Qwen2(Decoder):
    """Grouped-query attention with biases and a gated MLP, each behind a norm."""

    def __init__(
        self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs, mesh: Mesh | None
    ) -> None:
        def make_layer(physical: ModelConfig, layer: int) -> PreNormLayer:
            window = model.window(layer)
            attention = Attention(
                physical, dtypes, rngs, mesh, AttentionKind(window=window, has_bias=True)
            )
            return PreNormLayer(physical, attention, GatedMLP(physical, dtypes, rngs))

        super().__init__(model, dtypes, rngs, mesh, make_layer)


def read_config(fields: Fields) -> ModelConfig:
    """A Qwen2."""
    common = common_fields(fields)
    return ModelConfig(**common, **qwen_windows(fields, common["num_hidden_layers"]))


def qwen_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Windows of Qwen2 and 3: a ``sliding_window`` counts only with ``use_sliding_window``, and
    then from layer ``max_window_layers`` on, unless ``layer_types`` says which.
    """
    if not uses_windows(fields):
        return {}
    windows = window_fields(fields, num_layers)
    first = fields.integer("max_window_layers", 28, low=0)
    if windows["sliding_window"] is None or fields.has("layer_types") or first == 0:
        return windows
    if first >= num_layers:
        return {}
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return {**windows, "layer_types": tuple(types)}


FAMILY = Family(Qwen2, read_config)
