"""Checkpoints of floats that tests draw: all that is asked of one but the tensors themselves."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from checkpoints.checkpoint import PLAIN, Wanted
from checkpoints.maker import make_parameters
from checkpoints.parameters import ParameterPath
from jaxinfer.config import ModelConfig
from jaxinfer.request import Ending
from jaxinfer.weights import Format, Integers


class FloatTensors:
    """A checkpoint without integers; a class of it has ``model`` and ``tensor``."""

    model: ModelConfig
    quantization = PLAIN
    rounding: Mapping[str, float] = {}
    notes: tuple[str, ...] = ()
    default_ending = Ending()

    @property
    def tensors(self) -> Self:
        """Its own."""
        return self

    def tensor(self, name: str) -> np.ndarray:
        """Returns a tensor by its canonical name."""
        raise NotImplementedError(name)

    def stored_format(self, name: str) -> Format | None:
        """Returns None: all are floats."""
        del name

    def integers(self, name: str) -> Integers:
        """Raises ``NotImplementedError``: there are none."""
        raise NotImplementedError(name)

    def load(self, wanted: Wanted) -> dict[ParameterPath, Any]:
        """Returns the parameters on their devices."""
        return make_parameters(self, wanted)
