"""Qwen3's dense models: a Llama whose queries and keys are normed by head (Yang et al. 2025)."""

from flax import nnx
from jax.sharding import Mesh

from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.models.attention import Attention, AttentionKind
from jaxinfer.models.decoder import Decoder, PreNormLayer
from jaxinfer.models.family import Family
from jaxinfer.models.feed_forward import GatedMLP
from jaxinfer.models.fields import Fields, common_fields
from jaxinfer.models.qwen2 import qwen_windows


class Qwen3(Decoder):
    """Grouped-query attention with normed queries and keys and a gated MLP, each behind a norm."""

    def __init__(
        self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs, mesh: Mesh | None
    ) -> None:
        def make_layer(physical: ModelConfig, layer: int) -> PreNormLayer:
            window = model.window(layer)
            attention = Attention(
                physical, dtypes, rngs, mesh, AttentionKind(window=window, has_qk_norm=True)
            )
            return PreNormLayer(physical, attention, GatedMLP(physical, dtypes, rngs))

        super().__init__(model, dtypes, rngs, mesh, make_layer)


def read_config(fields: Fields) -> ModelConfig:
    """A Qwen3. Its heads are of 128 where nothing is said."""
    fields.expect("attention_bias", False)
    common = common_fields(fields)
    common["head_dim"] = fields.integer("head_dim", 128)
    return ModelConfig(**common, **qwen_windows(fields, common["num_hidden_layers"]))


FAMILY = Family(Qwen3, read_config)
