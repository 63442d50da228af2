"""Phi-3 and Phi-4-mini: a Llama with fused projections and long rope (Abdin et al. 2024).

Which of two sets of rope factors counts is decided once, by the context that is served: keys that
lie in the cache keep their rotation. (transformers changes over when a text grows beyond the first
context, and computes all of it again.) Unless it is asked for more, a server serves that first
context, in which both agree.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family
from jaxinfer.models.fields import Fields, common_fields, single_window
from jaxinfer.models.llama import Llama


def read_config(fields: Fields) -> ModelConfig:
    """A Phi-3; with ``partial_rotary_factor`` only the first dimensions of a head are rotated."""
    fields.expect("attention_bias", False)
    defaults = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
    fields = fields.with_defaults(defaults)
    common = common_fields(fields)
    windows = single_window(fields, common["num_hidden_layers"])
    # A window as long as the context is none.
    if (windows["sliding_window"] or 0) >= common["max_position_embeddings"]:
        windows = {}
    rope = fields.fields("rope_parameters") if fields.has("rope_parameters") else fields
    part = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    rotary_dim = None if part == 1 else int(common["head_dim"] * part)
    return ModelConfig(**common, **windows, rotary_dim=rotary_dim)


FAMILY = Family(
    Llama,
    read_config,
    hugging_face={
        "self_attn.qkv_proj.weight": ("q", "k", "v"),
        "mlp.gate_up_proj.weight": ("gate", "up"),
    },
    gguf={"attn_qkv.weight": ("q", "k", "v"), "ffn_up.weight": ("gate", "up")},
)
