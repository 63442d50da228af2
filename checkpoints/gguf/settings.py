"""Settings of a GGUF file's architecture, checked as they are read; the rest is refused by name.

Knows no family: a setting that nobody has read and that is not neutral asks for a computation that
no module here has.
"""

import math
from collections.abc import Mapping

import numpy as np

from checkpoints.gguf.file import MetadataValue
from checkpoints.gguf.metadata import metadata_value

# Float32 in files, float64 here.
_TOLERANCE = 1e-5

# Settings that no number follows from.
_HARMLESS = frozenset(
    (
        "vocab_size",  # the embedding has so many rows
        "tensor_data_layout",
        "rope.scaling.finetuned",
        "pooling_type",  # of embeddings of texts
        "classifier.output_labels",
    )
)
# Values that change nothing, where these are not zero, false and nothing at all: llama.cpp's
# defaults, which are not always what it takes a zero for.
_NEUTRAL: Mapping[str, tuple[bool | float, ...]] = {
    "attention.causal": (True,),
    "attention.output_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "interleave_moe_layer_step": (0, 1),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (-1.0, 1.0),  # -1 is not set
}


class Settings:
    """The metadata keys under ``architecture``, by their names behind it.

    Every method raises ``ValueError`` naming the key and its value.
    """

    def __init__(self, metadata: Mapping[str, MetadataValue], architecture: str) -> None:
        self._metadata, self._architecture = metadata, architecture
        self._read = set[str]()

    def key(self, name: str) -> str:
        """Returns the whole key."""
        return f"{self._architecture}.{name}"

    def has(self, name: str) -> bool:
        """Tells if a key is there."""
        return self.key(name) in self._metadata

    def get[T: (int, float, str, bool)](
        self, name: str, kind: type[T], default: T | None = None
    ) -> T:
        """A value of the wanted type, ``default`` when it is absent."""
        self._read.add(name)
        return metadata_value(self._metadata, self.key(name), kind, default)

    def array(self, name: str) -> np.ndarray | None:
        """Returns an array of numbers, None where the key is absent or no array."""
        value = self._metadata.get(self.key(name))
        if not isinstance(value, np.ndarray):
            return None
        self._read.add(name)
        return value

    def expect[T: (int, float)](self, name: str, kind: type[T], *allowed: T) -> None:
        """Refuses a key that is there with a value not among ``allowed``."""
        value = self.get(name, kind, allowed[0])
        if not any(math.isclose(value, one, rel_tol=_TOLERANCE) for one in allowed):
            only = " or ".join(f"{one:g}" for one in allowed)
            raise ValueError(f"{self.key(name)} is {value:g}; only {only} is supported here")

    def ignore(self, *names: str) -> None:
        """Takes keys that change nothing in this model for read."""
        self._read.update(names)

    def refuse_rest(self) -> None:
        """Refuses the first key that nobody has read and that may change what is computed."""
        prefix = self.key("")
        for key, value in self._metadata.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in self._read or name in _HARMLESS:
                continue
            if not _is_neutral(name, value):
                raise ValueError(f"{key} is {_shown(value)}, which is not supported")


def _is_neutral(name: str, value: MetadataValue) -> bool:
    if name in _NEUTRAL:
        return isinstance(value, bool | int | float) and value in _NEUTRAL[name]
    return not value.any() if isinstance(value, np.ndarray) else not value


def _shown(value: MetadataValue) -> str:
    if isinstance(value, np.ndarray | tuple):
        return f"an array of {len(value)}"
    return f"{value!r:.60}"
