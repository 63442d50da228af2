"""The mesh and the one table that says which logical axis is split over it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

TENSOR = "tensor"

# Logical axis of a parameter or cache -> mesh axis it is split over (absent: replicated).
RULES: Mapping[str, str] = {"kv_heads": TENSOR, "ffn": TENSOR, "vocab": TENSOR}


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A one-dimensional mesh over ``devices`` for tensor parallelism."""
    return jax.make_mesh((len(devices),), (TENSOR,), (AxisType.Auto,), devices=devices)


def named_sharding(mesh: Mesh, axes: Sequence[str | None] = ()) -> NamedSharding:
    """The sharding of an array whose dimensions are called ``axes``; () replicates."""
    return NamedSharding(mesh, PartitionSpec(*(axis and RULES.get(axis) for axis in axes)))


def abstract_parameters(state: nnx.State, mesh: Mesh) -> dict[Any, Any]:
    """Shapes, dtypes and shardings of a model's parameters as a nested pure dict.

    ``state`` comes from ``nnx.eval_shape``; the logical axes are read from each ``nnx.Param``.
    """

    def place(variable: nnx.Variable[Any]) -> jax.ShapeDtypeStruct:
        shape = variable.get_value()
        axes = variable.get_metadata().get("out_sharding") or ()
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=named_sharding(mesh, axes))

    placed = jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(placed)
