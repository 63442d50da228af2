"""A family as its file describes it: its module, its configuration, the names of its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.models.fields import Fields

# A tensor's name in a file -> what is in it, stacked along its rows. Names of layers are without
# the layer's prefix. "{expert}" stands for the number of an expert.
TensorNames = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """``module(model, dtypes, rngs, mesh)`` is the Flax module, a Decoder.

    ``read_config`` gets the fields of a ``config.json``, under whose names those of a GGUF file
    come as well, and raises ``ValueError`` for what the module does not compute. ``hugging_face``
    and ``gguf`` name the tensors that are not called as most families call them (see
    checkpoints/tensor_names.py). ``norm_offset`` is added to what Hugging Face stores of a norm's
    scale; GGUF files have it added. ``gguf_permutes``: rows of Q and K in GGUF are in the order of
    neighbouring pairs.
    """

    module: Callable[..., Any]
    read_config: Callable[[Fields], ModelConfig]
    hugging_face: TensorNames = field(default_factory=dict)
    gguf: TensorNames = field(default_factory=dict)
    norm_offset: float = 0.0
    gguf_permutes: bool = False
