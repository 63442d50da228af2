"""Qwen3's mixtures of experts: Qwen3's attention, experts in every layer (Yang et al. 2025)."""

from flax import nnx
from jax.sharding import Mesh

from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.models.attention import Attention, AttentionKind
from jaxinfer.models.decoder import Decoder, PreNormLayer
from jaxinfer.models.family import Family
from jaxinfer.models.feed_forward import MixtureOfExperts
from jaxinfer.models.fields import Fields, common_fields, single_window, uses_windows


class Qwen3Moe(Decoder):
    """Grouped-query attention with normed queries and keys, and experts, each behind a norm."""

    def __init__(
        self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs, mesh: Mesh | None
    ) -> None:
        def make_layer(physical: ModelConfig, layer: int) -> PreNormLayer:
            window = model.window(layer)
            attention = Attention(
                physical, dtypes, rngs, mesh, AttentionKind(window=window, has_qk_norm=True)
            )
            experts = MixtureOfExperts(physical, dtypes, rngs, mesh, model.num_experts)
            return PreNormLayer(physical, attention, experts)

        super().__init__(model, dtypes, rngs, mesh, make_layer)


def read_config(fields: Fields) -> ModelConfig:
    """A Qwen3-MoE with experts in every layer, as all released ones have."""
    fields.expect("attention_bias", False)
    fields.expect("decoder_sparse_step", 1)
    fields.expect("mlp_only_layers", [])
    common = common_fields(fields)
    common["intermediate_size"] = fields.integer("moe_intermediate_size")
    # Later versions of transformers write what Mixtral calls it.
    experts = "num_experts" if fields.has("num_experts") else "num_local_experts"
    fields.expect("num_local_experts", fields.integer(experts))
    # Where windows are used, all layers have one: max_window_layers is not looked at.
    windows = {}
    if uses_windows(fields):
        windows = single_window(fields, common["num_hidden_layers"])
    return ModelConfig(
        **common,
        **windows,
        num_experts=fields.integer(experts),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
    )


FAMILY = Family(Qwen3Moe, read_config)
