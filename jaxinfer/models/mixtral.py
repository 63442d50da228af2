"""Mixtral: a Mistral with experts in every layer (Jiang et al. 2024). A GGUF file says "llama"."""

from flax import nnx
from jax.sharding import Mesh

from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.models.attention import Attention, AttentionKind
from jaxinfer.models.decoder import Decoder, PreNormLayer
from jaxinfer.models.family import Family
from jaxinfer.models.feed_forward import MixtureOfExperts
from jaxinfer.models.fields import Fields, common_fields, single_window


class Mixtral(Decoder):
    """Grouped-query attention and experts, each behind a norm."""

    def __init__(
        self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs, mesh: Mesh | None
    ) -> None:
        def make_layer(physical: ModelConfig, layer: int) -> PreNormLayer:
            attention = Attention(
                physical, dtypes, rngs, mesh, AttentionKind(window=model.window(layer))
            )
            experts = MixtureOfExperts(physical, dtypes, rngs, mesh, model.num_experts)
            return PreNormLayer(physical, attention, experts)

        super().__init__(model, dtypes, rngs, mesh, make_layer)


def read_config(fields: Fields) -> ModelConfig:
    """A Mixtral; the weights of a token's experts always add up to 1."""
    fields = fields.with_defaults({"rms_norm_eps": 1e-5, "rope_theta": 1e6})
    common = common_fields(fields)
    return ModelConfig(
        **common,
        **single_window(fields, common["num_hidden_layers"]),
        num_experts=fields.integer("num_local_experts"),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
    )


FAMILY = Family(
    Mixtral,
    read_config,
    hugging_face={
        "block_sparse_moe.gate.weight": ("router",),
        "block_sparse_moe.experts.{expert}.w1.weight": ("experts_gate",),
        "block_sparse_moe.experts.{expert}.w2.weight": ("experts_down",),
        "block_sparse_moe.experts.{expert}.w3.weight": ("experts_up",),
    },
    gguf_permutes=True,
)
