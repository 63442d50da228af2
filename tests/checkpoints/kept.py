"""Checkpoints of integers, loaded with and without keeping them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from checkpoints.gguf.checkpoint import GGUFCheckpoint
from checkpoints.held import held_formats
from checkpoints.hugging_face.checkpoint import HuggingFaceCheckpoint
from checkpoints.load import load_parameters
from jaxinfer import models
from jaxinfer.config import KEPT, DtypePolicy
from jaxinfer.models import quantized_weights
from jaxinfer.sharding import abstract_parameters, make_mesh
from tests.jaxinfer.tiny import CPU_DTYPES

KeptCheckpoint = GGUFCheckpoint | HuggingFaceCheckpoint


def policy(checkpoint: KeptCheckpoint) -> DtypePolicy:
    """Float32 but for the matrices that the checkpoint has as integers."""
    forms = held_formats(checkpoint)
    return dataclasses.replace(CPU_DTYPES, quantization=KEPT, matrix_formats=forms)


def parameters_of(checkpoint: KeptCheckpoint, dtypes: DtypePolicy) -> dict[Any, Any]:
    """Returns what is loaded on one device."""
    _, state = models.abstract(checkpoint.model, dtypes)
    abstract = abstract_parameters(state, make_mesh(jax.devices("cpu")[:1]))
    made = quantized_weights(checkpoint.model, dtypes)
    return load_parameters(checkpoint, abstract, quantized=made, keeps=bool(made))


def assert_same(plain: Any, kept: Any, made: Any, path: tuple[Any, ...] = ()) -> None:
    """Every matrix stands for the numbers of the plain one."""
    if path in made:
        np.testing.assert_array_equal(made[path].dequantize(kept), plain, err_msg=str(path))
    elif isinstance(plain, dict):
        for key, value in plain.items():
            assert_same(value, kept[key], made, (*path, key))
    else:
        np.testing.assert_array_equal(kept, plain)
