"""The Llama family: Llama 2, 3, 3.x, SmolLM2."""

from flax import nnx
from jax.sharding import Mesh

from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.models.attention import Attention, AttentionKind
from jaxinfer.models.decoder import Decoder, PreNormLayer
from jaxinfer.models.family import Family
from jaxinfer.models.feed_forward import GatedMLP
from jaxinfer.models.fields import Fields, common_fields


class Llama(Decoder):
    """Grouped-query attention and a gated MLP, each behind a norm."""

    def __init__(
        self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs, mesh: Mesh | None
    ) -> None:
        def make_layer(physical: ModelConfig, layer: int) -> PreNormLayer:
            attention = Attention(
                physical, dtypes, rngs, mesh, AttentionKind(window=model.window(layer))
            )
            return PreNormLayer(physical, attention, GatedMLP(physical, dtypes, rngs))

        super().__init__(model, dtypes, rngs, mesh, make_layer)


def read_config(fields: Fields) -> ModelConfig:
    """A Llama; Hugging Face's has options for biases, which no released model uses."""
    for name in ("attention_bias", "mlp_bias"):
        fields.expect(name, False)
    fields.expect("pretraining_tp", 1)
    common = common_fields(fields)
    fields.expect("layer_types", ["full_attention"] * common["num_hidden_layers"])
    return ModelConfig(**common)


FAMILY = Family(Llama, read_config, gguf_permutes=True)
