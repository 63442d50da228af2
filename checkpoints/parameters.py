"""Parameters made of canonical tensors: of which, and how.

Parameters are the modules' own (jaxinfer/models): named by the last part of their path, in the
order of dimensions that their products want. Canonical tensors: see tensor_names. Axis letters: E
embed, G kv heads, R query heads of a kv head, D head dim, F ffn, V vocab, X experts.
"""

from collections.abc import Callable, Mapping

import numpy as np

from checkpoints.gguf.blocks import aligned_empty

ParameterPath = tuple[str | int, ...]
Shape = tuple[int, ...]
# Canonical name, without the layer's prefix -> float32 tensor.
ReadTensor = Callable[[str], np.ndarray]


def tensor_shapes(
    parameter_shapes: Mapping[ParameterPath, Shape], is_tied: bool
) -> dict[str, Shape]:
    """The shapes of all canonical tensors that a model's parameters are made of, by name."""
    shapes: dict[str, Shape] = {}
    for path, shape in parameter_shapes.items():
        for part, part_shape in _sources(str(path[-1]), shape, is_tied).items():
            shapes[_prefix(path) + part] = part_shape
    return shapes


def source_names(path: ParameterPath, shape: Shape, is_tied: bool) -> list[str]:
    """The canonical tensors that the parameter at ``path`` is made of."""
    return [_prefix(path) + part for part in _sources(str(path[-1]), shape, is_tied)]


def assemble(
    path: ParameterPath, shape: Shape, dtype: np.dtype, tensor: ReadTensor, is_tied: bool
) -> np.ndarray:
    """The parameter at ``path``, of logical ``shape``; ``tensor`` takes canonical names."""
    name = str(path[-1])
    parts = [tensor(source) for source in source_names(path, shape, is_tied)]
    match name:
        case "qkv":
            return _stack_heads(parts, shape, dtype)
        case "qkv_bias":
            biases = [part.reshape(1, -1) for part in parts]
            return _stack_heads([part.T for part in biases], (1, *shape), dtype)[0]
        case "gate_up":
            out = aligned_empty(shape, dtype)
            out[:, 0], out[:, 1] = parts[0].T, parts[1].T
            return out
        case "experts_gate_up":
            out, ffn = aligned_empty(shape, dtype), shape[2] // 2
            out[:, :, :ffn] = parts[0].swapaxes(1, 2)
            out[:, :, ffn:] = parts[1].swapaxes(1, 2)
            return out
        case "experts_down":
            array = parts[0].swapaxes(1, 2)
        case "o_proj" | "down_proj" | "lm_head" | "router":
            array = parts[0].T
        case _:
            array = parts[0]
    return np.ascontiguousarray(array, dtype).reshape(shape)


def _prefix(path: ParameterPath) -> str:
    return f"layers.{path[1]}." if path[0] == "layers" else ""


def _sources(name: str, shape: Shape, is_tied: bool) -> dict[str, Shape]:
    """The canonical tensors of a parameter, in order, with their shapes."""
    match name, shape:
        case "qkv", (embed, groups, heads, head_dim):
            key = (groups * head_dim, embed)
            return {"q": (groups * (heads - 2) * head_dim, embed), "k": key, "v": key}
        case "qkv_bias", (groups, heads, head_dim):
            key = (groups * head_dim,)
            return {"q_bias": (groups * (heads - 2) * head_dim,), "k_bias": key, "v_bias": key}
        case "o_proj", (groups, heads, head_dim, embed):
            return {"o": (embed, groups * heads * head_dim)}
        case "gate_up", (embed, _, ffn):
            return {"gate": (ffn, embed), "up": (ffn, embed)}
        case "down_proj", (ffn, embed):
            return {"down": (embed, ffn)}
        case "experts_gate_up", (experts, embed, both):
            half = (experts, both // 2, embed)
            return {"experts_gate": half, "experts_up": half}
        case "experts_down", (experts, ffn, embed):
            return {"experts_down": (experts, embed, ffn)}
        case "router", (embed, experts):
            return {"router": (experts, embed)}
        case "lm_head", (embed, vocab):
            return {"embed_tokens" if is_tied else "lm_head": (vocab, embed)}
    return {name: shape}


def _stack_heads(parts: list[np.ndarray], shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Q, K and V [out, E] -> [E, G, R + 2, D]."""
    embed, groups, heads, head_dim = shape
    out = aligned_empty(shape, dtype)
    query, key, value = (part.T for part in parts)
    out[:, :, : heads - 2] = query.reshape(embed, groups, heads - 2, head_dim)
    out[:, :, heads - 2] = key.reshape(embed, groups, head_dim)
    out[:, :, heads - 1] = value.reshape(embed, groups, head_dim)
    return out
