"""Tensor parallelism: the mesh, which logical axis is split over it, and the shapes that gives.

A model's *logical* shape is its config's. Its *physical* shape is what the devices hold: axes that
do not divide by their number are padded with zeros, and kv heads fewer than devices are repeated.
With one device the two are the same. Axis letters: E embed, G kv heads, R query heads a kv head,
D head dim, F ffn, V vocab, X experts, N devices.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfer.config import ModelConfig

# ``jax.Device`` is a value to type checkers.
Device = Any

TENSOR = "tensor"

# Logical axis of a parameter or cache -> mesh axis it is split over (absent: replicated).
RULES: Mapping[str, str] = {
    "kv_heads": TENSOR,
    "ffn": TENSOR,
    "experts": TENSOR,
    "vocab": TENSOR,
}

# Logical axes that are padded, and their sizes' names in the model.
_PADDED: Mapping[str, str] = {
    "ffn": "intermediate_size",
    "experts": "num_experts",
    "vocab": "vocab_size",
}
# Logical axes of the heads of each kv head, always next to "kv_heads", and how many are no queries.
_HEADS: Mapping[str, int] = {"heads": 0, "heads_and_kv": 2}

# Where the order of a weight's dimensions in memory decides whether its product copies it first.
TILED_PLATFORMS = ("tpu",)


def make_mesh(devices: Sequence[Device]) -> Mesh:
    """A one-dimensional mesh over ``devices`` for tensor parallelism."""
    if len(devices) & (len(devices) - 1):
        # JAX orders devices along their links, and asserts that TPUs are a whole box of them.
        return Mesh(np.asarray(devices), (TENSOR,), axis_types=(AxisType.Auto,))
    return jax.make_mesh((len(devices),), (TENSOR,), (AxisType.Auto,), devices=devices)


def num_tensor_devices(mesh: Mesh | None) -> int:
    """N: over how many devices split axes are divided; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[TENSOR]


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes by the table; () replicates."""
    return PartitionSpec(*(axis and RULES.get(axis) for axis in axes))


def named_sharding(mesh: Mesh, axes: Sequence[str | None] = ()) -> NamedSharding:
    """The sharding of an array whose dimensions are called ``axes``; () replicates."""
    return NamedSharding(mesh, partition_spec(axes))


def abstract_parameters(state: nnx.State, mesh: Mesh) -> dict[Any, Any]:
    """Shapes, dtypes and shardings of a model's parameters as a nested pure dict.

    ``state`` comes from ``nnx.eval_shape``; the logical axes are read from each ``nnx.Param``.
    """

    def place(variable: nnx.Variable[Any]) -> jax.ShapeDtypeStruct:
        shape = variable.get_value()
        axes = variable.get_metadata().get("out_sharding") or ()
        where: Any = device_format(mesh, axes)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    placed = jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(placed)


def device_format(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding | Format:
    """Returns how a parameter with these logical axes lies in the memory of its devices.

    A TPU multiplies tiles of the last two dimensions. A weight [E, ..., X] lies there as matrices
    [E, X]: left in order it is copied in every call (272 MiB a layer of Llama 3 8B).
    """
    sharding = named_sharding(mesh, axes)
    device: Device = mesh.devices.flat[0]
    if device.platform not in TILED_PLATFORMS:
        return sharding
    if len(axes) == 2:
        return Format(Layout((0, 1)), sharding)
    if len(axes) < 3 or axes[0] != "embed":
        return sharding
    last = len(axes) - 1
    return Format(Layout((*range(1, last), 0, last)), sharding)


def place(array: np.ndarray | jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """``array`` on the devices of ``wanted``, in the order of dimensions that it has there.

    In two steps, since JAX changes the order only where an array lies already.
    """
    # May alias: on a CPU it need not be copied again.
    moved = jax.device_put(array, wanted.sharding, may_alias=True)
    format_: Any = wanted.format
    return moved if format_.layout is None else jax.device_put(moved, format_)


def device_bytes(arrays: Any) -> int:
    """Returns the bytes that a tree of placed or abstract arrays takes on each of its devices."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(arrays)
    )


def physical_model(model: ModelConfig, num_devices: int) -> ModelConfig:
    """``model`` with the shapes that ``num_devices`` hold together; itself for one device.

    Kv heads are split where ``num_devices`` divides them. Where they divide it, each is repeated,
    and its query heads are divided over its copies; missing query heads are padding, and a copy
    may hold nothing else. Raises ``ValueError`` where neither divides the other.
    """
    kv_heads = model.num_key_value_heads
    if num_devices < 1:
        raise ValueError(f"the number of devices must be at least 1, got {num_devices}")
    if not can_divide_heads(model, num_devices):
        fitting = [str(n) for n in range(1, kv_heads) if kv_heads % n == 0]
        raise ValueError(
            f"{kv_heads} kv heads cannot be divided over {num_devices} devices: tensor parallelism "
            f"must be {', '.join(fitting)} or a multiple of {kv_heads}"
        )
    copies = max(1, num_devices // kv_heads)
    query_heads = -(-model.num_attention_heads // (kv_heads * copies))
    # Experts are divided whole.
    ffn = model.intermediate_size if model.num_experts else None
    return dataclasses.replace(
        model,
        num_key_value_heads=kv_heads * copies,
        num_attention_heads=kv_heads * copies * query_heads,
        intermediate_size=ffn or _round_up(model.intermediate_size, num_devices),
        num_experts=_round_up(model.num_experts, num_devices),
        vocab_size=_round_up(model.vocab_size, num_devices),
    )


def can_divide_heads(model: ModelConfig, num_devices: int) -> bool:
    """Tells if one of kv heads and devices divides the other."""
    kv_heads = model.num_key_value_heads
    return kv_heads % num_devices == 0 or num_devices % kv_heads == 0


def physical_shape(
    axes: Sequence[str | None], logical: tuple[int, ...], physical: ModelConfig
) -> tuple[int, ...]:
    """Returns the shape, for ``physical``, of a parameter of ``logical`` shape with ``axes``."""
    kv_heads = physical.num_key_value_heads
    sizes: dict[str | None, int] = {"kv_heads": kv_heads}
    sizes |= {axis: physical.num_attention_heads // kv_heads + n for axis, n in _HEADS.items()}
    sizes |= {axis: getattr(physical, field) for axis, field in _PADDED.items()}
    return tuple(sizes.get(axis, size) for axis, size in zip(axes, logical, strict=True))


def physical_parameter(
    axes: Sequence[str | None], logical: np.ndarray, model: ModelConfig, physical: ModelConfig
) -> np.ndarray:
    """Returns what stands for ``logical`` in a model of ``physical`` shape, for the same outputs.

    ``axes`` are its logical axes: kv heads are repeated, the heads beside them dealt out, and what
    is divided is padded with zeros at its end. ``logical`` itself where nothing changes.
    """
    if model == physical:
        return logical
    array = logical
    if "kv_heads" in axes:
        array = _repeat_heads(array, axes, model, physical)
    for axis, name in enumerate(axes):
        if name is not None and name in _PADDED:
            size, wanted = (getattr(of, _PADDED[name]) for of in (model, physical))
            # Scales of groups of inputs are as many fewer there as here.
            array = _pad(array, axis, array.shape[axis] * wanted // size)
    return array


def explain_heads(model: ModelConfig, num_devices: int) -> str:
    """Explains what becomes of the heads, in one line."""
    physical = physical_model(model, num_devices)
    kv_heads, query_heads = model.num_key_value_heads, model.num_attention_heads
    if physical.num_key_value_heads == kv_heads:
        return f"{kv_heads} kv heads over {num_devices} devices: {kv_heads // num_devices} each"
    line = f"{kv_heads} kv heads replicated {num_devices // kv_heads} times"
    if physical.num_attention_heads != query_heads:
        line += f", {query_heads} query heads padded to {physical.num_attention_heads}"
    return line


def _repeat_heads(
    array: np.ndarray, axes: Sequence[str | None], model: ModelConfig, physical: ModelConfig
) -> np.ndarray:
    axis = list(axes).index("kv_heads")
    copies = physical.num_key_value_heads // model.num_key_value_heads
    beside = axes[axis + 1] if axis + 1 < len(axes) else None
    if beside is None or beside not in _HEADS:
        return np.repeat(array, copies, axis)
    num_queries = array.shape[axis + 1] - _HEADS[beside]
    queries, rest = np.split(array, [num_queries], axis=axis + 1)
    queries = _deal_queries(queries, axis, model, physical)
    return np.concatenate([queries, np.repeat(rest, copies, axis)], axis + 1)


def _deal_queries(
    array: np.ndarray, axis: int, model: ModelConfig, physical: ModelConfig
) -> np.ndarray:
    """Axes (G, R) at ``axis`` -> (G', R'): R in order over the copies of its kv head, then zeros.

    G' R' is at least G R and a multiple of G: a padded copy follows those that have real heads.
    """
    kv_heads = model.num_key_value_heads
    padded = _pad(array, axis + 1, physical.num_attention_heads // kv_heads)
    dealt = physical.num_attention_heads // physical.num_key_value_heads
    before, after = array.shape[:axis], array.shape[axis + 2 :]
    return padded.reshape(*before, physical.num_key_value_heads, dealt, *after)


def _pad(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    if array.shape[axis] == size:
        return array
    missing = [(0, size - length if i == axis else 0) for i, length in enumerate(array.shape)]
    return np.pad(array, missing)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
