"""The making of parameters from canonical tensors, as their declarations say it.

Knows no parameter by its name (jaxinfer/declaration.py). Canonical tensors: see tensor_names.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from checkpoints.gguf.blocks import aligned_empty
from jaxinfer.declaration import Declaration, Sources

ParameterPath = tuple[str | int, ...]
Shape = tuple[int, ...]
# Canonical name, without the layer's prefix -> float32 tensor.
ReadTensor = Callable[[str], np.ndarray]


def tensor_shapes(parameters: Mapping[ParameterPath, Declaration]) -> dict[str, Shape]:
    """Returns the shapes of all canonical tensors that parameters are made of, by name."""
    shapes: dict[str, Shape] = {}
    for path, declared in parameters.items():
        for name, part in _parts(path, declared):
            sizes = [one.stop - one.start for one in part]
            shapes[name] = tuple(
                math.prod(sizes[axis] for axis in axes) for axes in declared.tensor_axes
            )
    return shapes


def source_names(path: ParameterPath, declared: Declaration) -> list[str]:
    """Returns the names of the canonical tensors that the parameter at ``path`` is made of."""
    return [name for name, _ in _parts(path, declared)]


def assemble(
    path: ParameterPath,
    declared: Declaration,
    dtype: np.dtype,
    tensor: ReadTensor,
    shape: Shape | None = None,
) -> np.ndarray:
    """Returns the parameter at ``path`` in ``dtype``; ``tensor`` takes canonical names.

    ``shape`` is another than the declared one for scales, which have fewer inputs.
    """
    shape = shape or declared.shape
    order = [axis for axes in declared.tensor_axes for axis in axes]
    parts = list(_parts(path, declared))
    if len(parts) == 1:
        ((name, _),) = parts
        split = tensor(name).reshape([shape[axis] for axis in order])
        # Not copied where the tensor lies as it is wanted.
        return np.ascontiguousarray(split.transpose(np.argsort(order)), dtype)
    out = aligned_empty(shape, dtype)
    for name, part in parts:
        view = out[part].transpose(order)
        view[...] = tensor(name).reshape(view.shape)
    return out


def _parts(path: ParameterPath, declared: Declaration) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """The canonical tensors of a parameter, in order, and where in it each of them lies."""
    prefix = f"layers.{path[1]}." if path[0] == "layers" else ""
    sources = declared.sources or Sources((str(path[-1]),))
    whole = [slice(0, size) for size in declared.shape]
    if sources.joined is None:
        (name,) = sources.names
        yield prefix + name, tuple(whole)
        return
    axis, start = declared.axes.index(sources.joined), 0
    for name, size in zip(sources.names, sources.sizes, strict=True):
        part = slice(start, start + size)
        yield prefix + name, (*whole[:axis], part, *whole[axis + 1 :])
        start += size
