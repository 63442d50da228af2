"""The one protocol of checkpoints, whatever form their files have, and its values.

Callers ask a checkpoint and never for its class: only load.py knows which forms there are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from checkpoints.parameters import ParameterPath
from jaxinfer.config import AnyTokenizer, DtypePolicy, MatrixFormats, ModelConfig
from jaxinfer.request import Ending, SamplingParams
from jaxinfer.weights import Format, Integers, QuantizedWeight

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantization:
    """``name`` and ``formats`` are what ``DtypePolicy`` has; a ``name`` of None is of floats."""

    name: str | None = None
    formats: MatrixFormats = ()

    @property
    def policy(self) -> DtypePolicy:
        """Float32 but for the matrices."""
        plain = ("float32", "float32", "float32")
        return DtypePolicy(*plain, quantization=self.name, matrix_formats=self.formats)


PLAIN = Quantization()


@dataclass(frozen=True)
class Wanted:
    """The parameters that devices want of a checkpoint.

    ``arrays``: ``jax.ShapeDtypeStruct`` by path, for a matrix in ``quantized`` a dict of those that
    its declaration makes, in the physical shapes of ``num_devices``. ``stored``: matrices in
    ``quantized`` are the integers that the file has, not rounded here. ``progress(done, total)`` is
    called after each parameter.
    """

    arrays: Mapping[ParameterPath, Any]
    num_devices: int = 1
    quantized: Mapping[ParameterPath, QuantizedWeight] = MappingProxyType({})
    stored: bool = False
    progress: Progress | None = None


class Tensors(Protocol):
    """A model and the tensors of its file, by the names of tensor_names."""

    @property
    def model(self) -> ModelConfig: ...

    def tensor(self, name: str) -> np.ndarray:
        """Returns a tensor as float32, ``[out, in]``."""
        ...

    def stored_format(self, name: str) -> Format | None:
        """Returns the format of a tensor's integers, None where it is of floats."""
        ...

    def integers(self, name: str) -> Integers:
        """Returns a tensor that has a format: ``[..., out, in]``, scales ``[..., out, groups]``."""
        ...


class Loadable(Protocol):
    """A model whose parameters can be put on devices."""

    @property
    def model(self) -> ModelConfig: ...

    def load(self, wanted: Wanted) -> dict[ParameterPath, Any]:
        """Returns the parameters on their devices.

        Raises ``ValueError`` naming one that is damaged or not finite, and its file.
        """
        ...


class Checkpoint(Loadable, Protocol):
    """A checkpoint that was opened: a model, its tokenizer, and how it is to be sampled.

    ``tensors``: those that parameters are made of; None where they have been made already.
    ``quantization``: the formats that they have been made in. ``rounding``: how much of itself a
    scale of stored integers was off at most, by types of the tensors that were read. ``notes``:
    lines for whoever loads it, of what the files have and nothing here makes use of.
    """

    @property
    def tokenizer(self) -> AnyTokenizer: ...

    @property
    def default_sampling(self) -> SamplingParams: ...

    @property
    def default_ending(self) -> Ending: ...

    @property
    def tensors(self) -> Tensors | None: ...

    @property
    def quantization(self) -> Quantization: ...

    @property
    def rounding(self) -> Mapping[str, float]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...
