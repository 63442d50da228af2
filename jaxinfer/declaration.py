"""The declaration of a parameter: all that initialising, dividing, padding and loading it need.

A module makes one for each of its parameters, and nobody else knows a parameter by its name.
"""

import math
from dataclasses import dataclass
from typing import Any

from flax import nnx

# Canonical tensors have one axis of this name for each that a parameter has, before all others.
STACKED = "experts"


@dataclass(frozen=True)
class Sources:
    """The canonical tensors (see checkpoints/tensor_names.py) that a parameter is made of.

    Several ``names`` lie one after the other along the axis called ``joined``, each of them as long
    as its number in ``sizes``.
    """

    names: tuple[str, ...]
    joined: str | None = None
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """A parameter's ``shape`` and, by the names of its ``axes``, where it is divided and padded.

    ``axes``: see ``RULES`` of sharding, and ``physical_parameter``. ``inputs``: those that a
    product sums over, next to each other; () for what is no matrix. ``sources``: None for one
    tensor that is called as the parameter is.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: tuple[int, ...] = ()
    sources: Sources | None = None

    @property
    def num_inputs(self) -> int:
        """The numbers that a product sums over."""
        return math.prod(self.shape[axis] for axis in self.inputs)

    @property
    def tensor_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each dimension of a canonical tensor the axes that it is: stacked, out, in."""
        stacked = [axis for axis, name in enumerate(self.axes) if name == STACKED]
        axes = range(len(self.shape))
        outputs = tuple(axis for axis in axes if axis not in (*stacked, *self.inputs))
        return (*((axis,) for axis in stacked), outputs, *([self.inputs] if self.inputs else []))

    def parameter(self, value: Any, **metadata: Any) -> Any:
        """Returns ``value``, an array of ``shape``, as a parameter with this declaration."""
        return nnx.Param(value, out_sharding=self.axes, declaration=self, **metadata)


def declaration_of(variable: nnx.Variable[Any]) -> Declaration:
    """Returns what ``variable`` was declared as; one that only has axes is a tensor of its own."""
    metadata = variable.get_metadata()
    if "declaration" in metadata:
        return metadata["declaration"]
    shape = tuple(variable.get_value().shape)
    return Declaration(shape, metadata.get("out_sharding") or (None,) * len(shape))
