"""Canonical names of tensors, and what files call them.

A checkpoint gives float32 tensors in Hugging Face's orientation, ``[out, in]`` for a matrix, by
canonical names: ``embed_tokens``, ``norm``, ``lm_head``, and in ``layers.{i}.`` what the tables
below have on their right. Q and K rows are in the order of rotate-half rotary embedding, and the
scales of norms are what is multiplied with. Experts are stacked, ``[X, out, in]``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.models.family import TensorNames

# As in most families; a family's own file names what is called otherwise there.
HUGGING_FACE_MODEL: Mapping[str, str] = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
HUGGING_FACE_LAYER: TensorNames = {
    "input_layernorm.weight": ("input_norm",),
    "self_attn.q_proj.weight": ("q",),
    "self_attn.k_proj.weight": ("k",),
    "self_attn.v_proj.weight": ("v",),
    "self_attn.q_proj.bias": ("q_bias",),
    "self_attn.k_proj.bias": ("k_bias",),
    "self_attn.v_proj.bias": ("v_bias",),
    "self_attn.q_norm.weight": ("q_norm",),
    "self_attn.k_norm.weight": ("k_norm",),
    "self_attn.o_proj.weight": ("o",),
    "post_attention_layernorm.weight": ("post_attention_norm",),
    "pre_feedforward_layernorm.weight": ("pre_feedforward_norm",),
    "post_feedforward_layernorm.weight": ("post_feedforward_norm",),
    "mlp.gate_proj.weight": ("gate",),
    "mlp.up_proj.weight": ("up",),
    "mlp.down_proj.weight": ("down",),
    "mlp.gate.weight": ("router",),
    "mlp.experts.{expert}.gate_proj.weight": ("experts_gate",),
    "mlp.experts.{expert}.up_proj.weight": ("experts_up",),
    "mlp.experts.{expert}.down_proj.weight": ("experts_down",),
}
GGUF_MODEL: Mapping[str, str] = {
    "embed_tokens": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
}
GGUF_LAYER: TensorNames = {
    "attn_norm.weight": ("input_norm",),
    "attn_q.weight": ("q",),
    "attn_k.weight": ("k",),
    "attn_v.weight": ("v",),
    "attn_q.bias": ("q_bias",),
    "attn_k.bias": ("k_bias",),
    "attn_v.bias": ("v_bias",),
    "attn_q_norm.weight": ("q_norm",),
    "attn_k_norm.weight": ("k_norm",),
    "attn_output.weight": ("o",),
    "ffn_norm.weight": ("post_attention_norm",),
    "post_ffw_norm.weight": ("post_feedforward_norm",),
    "ffn_gate.weight": ("gate",),
    "ffn_up.weight": ("up",),
    "ffn_down.weight": ("down",),
    "ffn_gate_inp.weight": ("router",),
    "ffn_gate_exps.weight": ("experts_gate",),
    "ffn_up_exps.weight": ("experts_up",),
    "ffn_down_exps.weight": ("experts_down",),
}


@dataclass(frozen=True)
class Place:
    """A canonical tensor's place in a file.

    ``names``: the file's tensors, one, or one for each expert. ``rows``: those that are meant, of
    ``shape[-2]`` (of ``shape[0]`` for a vector). ``shape``: of each of the file's tensors.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: slice


def tensor_places(
    shapes: Mapping[str, tuple[int, ...]],
    model_names: Mapping[str, str],
    layer_names: TensorNames,
    own_names: TensorNames,
    layer_prefix: str,
) -> dict[str, Place]:
    """The place of every canonical tensor of ``shapes``.

    ``own_names``: what the family calls otherwise than ``layer_names`` does. ``layer_prefix``
    has ``{layer}`` in it.
    """
    own_parts = {part for parts in own_names.values() for part in parts}
    tables = [{name: parts for name, parts in layer_names.items() if own_parts.isdisjoint(parts)}]
    tables.append(dict(own_names))
    found = {part: (n, parts) for table in tables for n, parts in table.items() for part in parts}
    places = {}
    for name, shape in shapes.items():
        if name in model_names:
            places[name] = Place((model_names[name],), shape, slice(0, shape[0]))
            continue
        _, layer, part = name.split(".")
        template, parts = found[part]
        prefix = layer_prefix.format(layer=layer)
        siblings = [shapes[f"layers.{layer}.{sibling}"] for sibling in parts]
        if "{expert}" in template:
            names = tuple(prefix + template.format(expert=x) for x in range(shape[0]))
            places[name] = Place(names, shape[1:], slice(0, shape[1]))
        else:
            axis = max(0, len(shape) - 2)
            first = sum(sibling[axis] for sibling in siblings[: parts.index(part)])
            total = sum(sibling[axis] for sibling in siblings)
            whole = (*shape[:axis], total, *shape[axis + 1 :])
            places[name] = Place((prefix + template,), whole, slice(first, first + shape[axis]))
    return places
