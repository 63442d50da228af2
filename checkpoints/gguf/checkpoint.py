"""A GGUF file as a checkpoint: its model, its tokenizer, its tensors by canonical name.

What the file says about the model is checked against the tensors that are there; a tensor or a
setting that would change the computation in a way the model does not know is refused, never
ignored.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.checkpoint import PLAIN, Wanted
from checkpoints.gguf.blocks import dequantize_columns, dequantize_rows
from checkpoints.gguf.config import read_model
from checkpoints.gguf.integers import STORED_TYPES, split_blocks
from checkpoints.gguf.metadata import metadata_value
from checkpoints.gguf.rope import ROPE_TENSORS
from checkpoints.gguf.split import GGUFFiles
from checkpoints.gguf.tokenizer import read_tokenizer
from checkpoints.maker import make_parameters
from checkpoints.parameters import ParameterPath, tensor_shapes
from checkpoints.tensor_names import GGUF_LAYER, GGUF_MODEL, tensor_places
from jaxinfer.config import SentencePieceSpec, TokenizerSpec
from jaxinfer.models import declared_parameters, family
from jaxinfer.request import Ending, SamplingParams
from jaxinfer.weights import Format, Integers

_SAMPLING = ("general.sampling.", "tokenizer.ggml.suppress_tokens")


class GGUFCheckpoint:
    """A GGUF file opened for loading: ``model``, ``tokenizer`` and ``tensor(name)``.

    Of a split one, ``path`` is the first shard. Raises ``ValueError`` when a file is damaged or
    missing, or describes a model that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.quantization = path, PLAIN
        # How much of itself a scale was off at most, by types of tensors whose integers were read.
        self.rounding: dict[str, float] = {}
        self._file = GGUFFiles(path)
        self._metadata = self._file.metadata
        with _named(path):
            self.model = read_model(self._file)
            self._family = family(self.model.architecture)
            self._shapes = tensor_shapes(declared_parameters(self.model))
            names = GGUF_MODEL, GGUF_LAYER, self._family.gguf
            self._places = tensor_places(self._shapes, *names, "blk.{layer}.")
            self._check_tensors()

    @property
    def tokenizer(self) -> TokenizerSpec | SentencePieceSpec:
        """The tokenizer. Raises ``ValueError`` when there is none, or of no supported kind."""
        with _named(self.path):
            return read_tokenizer(self._metadata, self.model.vocab_size)

    @property
    def default_sampling(self) -> SamplingParams:
        """Greedy: what such files may say of samplers is of llama.cpp's own."""
        return SamplingParams()

    @property
    def notes(self) -> tuple[str, ...]:
        """Tells of settings of llama.cpp's samplers."""
        keys = sorted(key for key in self._metadata if key.startswith(_SAMPLING))
        return (f"{self.path}: not read: {', '.join(keys)}",) if keys else ()

    def tensor(self, name: str) -> np.ndarray:
        """Returns a tensor as float32 in Hugging Face's orientation, ``[out, in]``.

        ``name`` is canonical, see tensor_names. Matrices come as the transpose of a contiguous
        ``[in, out]`` array. Raises ``ValueError`` for a name that the model has not.
        """
        if name not in self._places:
            raise ValueError(f"no tensor {name!r} in {self.path}")
        place, shape = self._places[name], self._shapes[name]
        tensor_type = self._file.tensors[place.names[0]].type
        data = self._file.tensor_bytes(place.names[0])
        # A tied embedding is wanted as the head that it also is.
        is_lookup = name == "embed_tokens" and not self.model.tie_word_embeddings
        if is_lookup or len(shape) == 1:
            return dequantize_rows(data, tensor_type).reshape(place.shape)[place.rows]
        if len(shape) == 3:
            experts = data.reshape(shape[0], shape[1], -1)
            columns = [dequantize_columns(rows, tensor_type) for rows in experts]
            return np.stack(columns).swapaxes(1, 2)
        data = data[place.rows]
        if self._family.gguf_permutes and name.endswith((".q", ".k")):
            data = _unpermute_rows(data, self.model.head_dim)
        return dequantize_columns(data, tensor_type).T

    @property
    def default_ending(self) -> Ending:
        """No stop strings: such files have none."""
        return Ending()

    @property
    def tensors(self) -> "GGUFCheckpoint":
        """Its own."""
        return self

    def load(self, wanted: Wanted) -> dict[ParameterPath, Any]:
        """Returns the parameters on their devices, see ``make_parameters``."""
        return make_parameters(self, wanted)

    def stored_format(self, name: str) -> Format | None:
        """Returns the format of a tensor's integers, None where it is of floats."""
        stored = STORED_TYPES.get(self._file.tensors[self._places[name].names[0]].type.name)
        return stored.form if stored else None

    def integers(self, name: str) -> Integers:
        """Returns a tensor that has a format: ``[..., out, in]``, scales ``[..., out, groups]``."""
        place, shape = self._places[name], self._shapes[name]
        tensor_type = self._file.tensors[place.names[0]].type
        data = self._file.tensor_bytes(place.names[0])
        if len(shape) == 2:
            data = data[place.rows]
        if self._family.gguf_permutes and name.endswith((".q", ".k")):
            data = _unpermute_rows(data, self.model.head_dim)
        parts, error = split_blocks(data.reshape(math.prod(shape[:-1]), -1), tensor_type)
        self.rounding[tensor_type.name] = max(error, self.rounding.get(tensor_type.name, 0.0))
        return Integers(
            parts.values.reshape(shape),
            parts.scales.reshape(*shape[:-1], -1),
            None if parts.minimums is None else parts.minimums.reshape(*shape[:-1], -1),
        )

    def _check_tensors(self) -> None:
        """Every tensor the model needs is there in its shape, and there is no other."""
        known: set[str] = set(ROPE_TENSORS)
        for place in self._places.values():
            for name in place.names:
                info = self._file.tensors.get(name)
                if info is None:
                    raise ValueError(f"tensor {name!r} is missing")
                if info.shape != place.shape:
                    raise ValueError(
                        f"tensor {name!r} has shape {info.shape}, the model needs {place.shape}"
                    )
                known.add(name)
        unknown = sorted(self._file.tensors.keys() - known)
        if unknown:
            architecture = metadata_value(self._metadata, "general.architecture", str)
            raise ValueError(
                f"{len(unknown)} tensors that a {architecture} model does not have, "
                f"{unknown[0]!r} the first"
            )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the file's name before whatever is wrong with what it says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _unpermute_rows(data: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes the order of Q and K rows that llama.cpp's converter gives to a Llama.

    There, rows of a head are pairs (i, i + D/2) for neighbouring-pair rotation; rotate-half wants
    all first halves, then all second halves. Works on ``[heads * D, bytes of a row]``.
    """
    pairs = data.reshape(-1, head_dim // 2, 2, data.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(data.shape)
