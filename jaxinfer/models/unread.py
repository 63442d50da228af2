"""Fields of a ``config.json`` that change the numbers somewhere, and that the family did not read.

Such files have many fields that nothing follows from, so these are named; of a rotation all are.
"""

from collections.abc import Mapping

from jaxinfer.models.fields import Fields

# Names in transformers' configurations and in those of code that comes with a model, with the
# values that change nothing besides null, false, 0 and what is empty.
_NUMBERS: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(
        (
            *("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias"),
            *("add_cross_attention", "is_encoder_decoder", "use_bidirectional_attention"),
            *("attn_logit_softcapping", "final_logit_softcapping", "attn_logit_softcap"),
            *("attention_multiplier", "query_pre_attn_scalar", "clip_qkv", "qk_norm"),
            *("use_qk_norm", "qk_layernorm", "use_qk_layernorm", "rope_interleave"),
            *("rope_interleaved", "alibi", "use_alibi", "parallel_attn", "use_parallel_residual"),
            *("attention_chunk_size", "attn_temperature_tuning", "nope_layer_interval"),
            *("kv_lora_rank", "q_lora_rank", "num_kv_shared_layers", "swiglu_limit", "scale_depth"),
            *("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size"),
            *("first_k_dense_replace", "hidden_size_per_layer_input", "rope_local_base_freq"),
            "apply_residual_connection_post_layernorm",
        ),
        (),
    ),
    **dict.fromkeys(
        (
            *("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"),
            *("lm_head_multiplier", "scale_emb", "partial_rotary_factor", "rotary_pct"),
            *("rope_ratio", "routed_scaling_factor", "moe_layer_freq", "decoder_sparse_step"),
            *("n_group", "topk_group", "num_experts", "num_local_experts", "n_routed_experts"),
        ),
        (1,),
    ),
    "norm_type": ("rms_norm", "rmsnorm"),
    "scoring_func": ("softmax",),
}
# Only true changes nothing.
_TRUE = ("is_causal", "use_rms_norm")
# Of the objects that describe a rotation: kinds are read, these do nothing.
_ROTATION_HARMLESS = ("type", "rope_type", "finetuned")


def refuse_unread(fields: Fields) -> None:
    """Raises ``ValueError`` naming the first field that asks for what was not looked at."""
    for name, value in fields.unread():
        if name in _TRUE:
            fields.expect(name, True)
        elif fields.is_rotation:
            if name not in _ROTATION_HARMLESS and value and value != 1:
                fields.expect(name)
        elif value and value not in _NUMBERS.get(name, (value,)):
            fields.expect(name, *_NUMBERS[name])
    for child in fields.children:
        refuse_unread(child)
