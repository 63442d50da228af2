"""The making of parameters, or of the arrays of quantized matrices, from a checkpoint's tensors."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints.checkpoint import Progress, Tensors, Wanted
from checkpoints.parameters import ParameterPath, assemble
from checkpoints.stored import stored_integers
from jaxinfer.config import ModelConfig
from jaxinfer.models import declared_parameters, parameter_shapes
from jaxinfer.sharding import physical_model, physical_parameter, place
from jaxinfer.weights import GroupedFormat, Integers, QuantizedWeight

# Dequantization is bound by memory, and each thread holds a parameter: more bring nothing.
NUM_THREADS = min(8, os.cpu_count() or 1)


def make_parameters(tensors: Tensors, wanted: Wanted) -> dict[ParameterPath, Any]:
    """Returns the parameters that are ``wanted``, made of ``tensors``, on their devices.

    The host holds the parameters being made, one a thread, besides what the devices hold. Raises
    ``ValueError`` as ``Maker.make`` does.
    """
    maker = Maker(tensors, wanted.quantized, wanted.stored, wanted.num_devices)

    def make(path: ParameterPath) -> Any:
        abstract = wanted.arrays[path]
        if path not in wanted.quantized:
            return place(np.asarray(maker.make(path, abstract.dtype)), abstract)
        arrays = maker.make(path, np.dtype(np.float32))
        assert isinstance(arrays, Mapping)
        return {name: place(np.asarray(arrays[name]), abstract[name]) for name in arrays}

    return make_all(make, parameter_shapes(tensors.model), wanted.progress)


def make_all(
    make: Callable[[ParameterPath], Any],
    shapes: Mapping[ParameterPath, tuple[int, ...]],
    progress: Progress | None,
) -> dict[ParameterPath, Any]:
    """``make(path)`` of every path in ``shapes``, several at a time; the first error ends it."""
    made: dict[ParameterPath, Any] = {}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        # The largest first, so that no thread is left alone with it at the end.
        order = sorted(shapes, key=lambda path: -math.prod(shapes[path]))
        futures = {pool.submit(make, path): path for path in order}
        try:
            for future in as_completed(futures):
                made[futures[future]] = future.result()
                if progress:
                    progress(len(made), len(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return made


@dataclass(frozen=True)
class Maker:
    """Makes the parameters that ``num_devices`` hold together, a matrix in ``quantized`` rounded.

    With ``stored`` these are the integers that the checkpoint has, see stored.
    """

    tensors: Tensors
    quantized: Mapping[ParameterPath, QuantizedWeight]
    stored: bool = False
    num_devices: int = 1

    def make(self, path: ParameterPath, dtype: np.dtype) -> np.ndarray | Mapping[str, np.ndarray]:
        """Makes the parameter at ``path`` in ``dtype``, or the arrays of its format by their names.

        Raises ``ValueError`` for numbers that are not finite, before or after they are rounded.
        """
        weight = self.quantized.get(path)
        declared = declared_parameters(self.tensors.model)[path]
        if weight is not None and self.stored:
            parts = stored_integers(self.tensors, path, declared, weight)
            parts = physical_integers(declared.axes, parts, weight, *self._models)
            return self._finite(weight.from_stored(parts), path)
        exact = np.dtype(np.float32) if weight else dtype
        array = assemble(path, declared, exact, self.tensors.tensor)
        self._check(array, path)
        array = physical_parameter(declared.axes, array, *self._models)
        return array if weight is None else self._finite(weight.quantize(array), path)

    @property
    def _models(self) -> tuple[ModelConfig, ModelConfig]:
        model = self.tensors.model
        return model, physical_model(model, self.num_devices)

    def _finite(self, arrays: Mapping[str, np.ndarray], path: ParameterPath) -> Any:
        for array in arrays.values():
            if array.dtype.kind == "f":
                self._check(array, path)
        return arrays

    def _check(self, array: np.ndarray, path: ParameterPath) -> None:
        if not np.isfinite(array).all():
            file = getattr(self.tensors, "path", None)  # not all tensors come from one
            raise ValueError(
                f"{file}: " * (file is not None)
                + f"parameter {path} has values that are not finite: a damaged checkpoint?"
            )


def physical_integers(
    axes: Sequence[str | None],
    parts: Integers,
    weight: QuantizedWeight,
    model: ModelConfig,
    physical: ModelConfig,
) -> Integers:
    """Returns ``parts``, in the logical ``axes`` of a matrix, in the shapes of ``physical``."""
    if model == physical:
        return parts

    def whole(array: np.ndarray) -> np.ndarray:
        return physical_parameter(axes, array, model, physical)

    values = whole(parts.values)
    if isinstance(weight.form, GroupedFormat):
        minimums = None if parts.minimums is None else whole(parts.minimums)
        return Integers(values, whole(parts.scales), minimums)
    # An output's scale is that of all its inputs, of which the first is never padding.
    scales = whole(np.broadcast_to(parts.scales, parts.values.shape))
    first = tuple(slice(1) if axis in weight.inputs else slice(None) for axis in range(scales.ndim))
    return Integers(values, scales[first])
