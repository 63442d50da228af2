"""What a checkpoint's tensors become: parameters, or the arrays of quantized matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from checkpoints.held import HoldsIntegers, held_integers
from checkpoints.parameters import ParameterPath, assemble
from jaxinfer.config import ModelConfig
from jaxinfer.models import declared_parameters
from jaxinfer.sharding import physical_model, physical_parameter
from jaxinfer.weights import GroupedFormat, Integers, QuantizedWeight


class Weights(Protocol):
    """A model and its tensors: float32, ``[out, in]``, by the names of tensor_names."""

    @property
    def model(self) -> ModelConfig: ...

    def tensor(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Maker:
    """Makes the parameters that ``num_devices`` hold together, a matrix in ``quantized`` rounded.

    With ``keeps`` these are the integers that the checkpoint has, see held.
    """

    checkpoint: Weights
    quantized: Mapping[ParameterPath, QuantizedWeight]
    keeps: bool = False
    num_devices: int = 1

    def make(self, path: ParameterPath, dtype: np.dtype) -> np.ndarray | Mapping[str, np.ndarray]:
        """The parameter at ``path`` in ``dtype``, or the arrays of its format by their names.

        Raises ``ValueError`` for numbers that are not finite, before or after they are rounded.
        """
        model, weight = self.checkpoint.model, self.quantized.get(path)
        declared = declared_parameters(model)[path]
        if weight is not None and self.keeps:
            assert isinstance(self.checkpoint, HoldsIntegers)
            parts = held_integers(self.checkpoint, path, declared, weight)
            parts = physical_integers(declared.axes, parts, weight, *self._models)
            return self._finite(weight.keep(parts), path)
        exact = np.dtype(np.float32) if weight else dtype
        array = assemble(path, declared, exact, self.checkpoint.tensor)
        self._check(array, path)
        array = physical_parameter(declared.axes, array, *self._models)
        return array if weight is None else self._finite(weight.quantize(array), path)

    @property
    def _models(self) -> tuple[ModelConfig, ModelConfig]:
        model = self.checkpoint.model
        return model, physical_model(model, self.num_devices)

    def _finite(self, arrays: Mapping[str, np.ndarray], path: ParameterPath) -> Any:
        for array in arrays.values():
            if array.dtype.kind == "f":
                self._check(array, path)
        return arrays

    def _check(self, array: np.ndarray, path: ParameterPath) -> None:
        if not np.isfinite(array).all():
            file = getattr(self.checkpoint, "path", None)  # not all weights come from one
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
