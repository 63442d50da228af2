"""The small random models of tests/data/random_family.py as checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.parameters import tensor_shapes
from checkpoints.tensor_names import (
    HUGGING_FACE_LAYER,
    HUGGING_FACE_MODEL,
    Place,
    tensor_places,
)
from jaxinfer.config import ModelConfig
from jaxinfer.models import declared_parameters, family, read_config
from tests.checkpoints.floats import FloatTensors
from tests.data.random_family import draw

REFERENCE = Path(__file__).parents[2] / "data" / "family_reference.json"
CASES: dict[str, dict[str, Any]] = json.loads(REFERENCE.read_text())["cases"]


class RandomCheckpoint(FloatTensors):
    """Weights drawn by their names in a Hugging Face file.

    ``model`` is what the reference's config.json describes, ``places`` where its canonical tensors
    lie in the file, rounded to ``dtype``.
    """

    def __init__(self, case: str, dtype: Any = np.float32) -> None:
        self.case = case
        self._dtype = dtype
        self.model: ModelConfig = read_config(CASES[case]["config"])
        shapes = tensor_shapes(declared_parameters(self.model))
        own = family(self.model.architecture).hugging_face
        names = HUGGING_FACE_MODEL, HUGGING_FACE_LAYER, own
        self.places: dict[str, Place] = tensor_places(shapes, *names, "model.layers.{layer}.")

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by its canonical name."""
        place = self.places[name]
        drawn = (draw(self.case, file_name, place.shape) for file_name in place.names)
        parts = [whole[place.rows].astype(self._dtype).astype(np.float32) for whole in drawn]
        tensor = np.stack(parts) if len(parts) > 1 else parts[0]
        offset = family(self.model.architecture).norm_offset
        return tensor + np.float32(offset) if name.endswith("norm") else tensor
