"""Checkpoints of integers, loaded as they are stored and as floats."""

import dataclasses
from typing import Any

import jax
import numpy as np

from checkpoints.gguf.checkpoint import GGUFCheckpoint
from checkpoints.hugging_face.checkpoint import HuggingFaceCheckpoint
from checkpoints.load import load_parameters
from checkpoints.stored import stored_formats
from jaxinfer import models
from jaxinfer.config import STORED, DtypePolicy
from jaxinfer.models import quantized_weights
from jaxinfer.sharding import abstract_parameters, make_mesh
from tests.jaxinfer.tiny import CPU_DTYPES

StoredCheckpoint = GGUFCheckpoint | HuggingFaceCheckpoint


def policy(checkpoint: StoredCheckpoint) -> DtypePolicy:
    """Float32 but for the matrices that the checkpoint has as integers."""
    forms = stored_formats(checkpoint)
    return dataclasses.replace(CPU_DTYPES, quantization=STORED, matrix_formats=forms)


def parameters_of(checkpoint: StoredCheckpoint, dtypes: DtypePolicy) -> dict[Any, Any]:
    """Returns the parameters as they are loaded on one device."""
    _, state = models.abstract(checkpoint.model, dtypes)
    abstract = abstract_parameters(state, make_mesh(jax.devices("cpu")[:1]))
    made = quantized_weights(checkpoint.model, dtypes)
    return load_parameters(checkpoint, abstract, quantized=made, stored=bool(made))


def assert_same(plain: Any, stored: Any, made: Any, path: tuple[Any, ...] = ()) -> None:
    """Every matrix stands for the numbers of the plain one."""
    if path in made:
        np.testing.assert_array_equal(made[path].dequantize(stored), plain, err_msg=str(path))
    elif isinstance(plain, dict):
        for key, value in plain.items():
            assert_same(value, stored[key], made, (*path, key))
    else:
        np.testing.assert_array_equal(stored, plain)
