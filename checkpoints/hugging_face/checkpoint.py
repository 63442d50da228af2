"""A Hugging Face folder as a checkpoint: config.json, safetensors, tokenizer.json.

Matrices may be floats, or integers as AWQ, GPTQ or compressed-tensors pack them. A tensor or a
setting that would change the computation in a way the model does not know is refused, never
ignored. No code of a folder is run.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.checkpoint import PLAIN, Wanted
from checkpoints.hugging_face.generation_config import (
    GENERATION_CONFIG,
    Generation,
    read_generation,
)
from checkpoints.hugging_face.packed_files import PackedFiles
from checkpoints.hugging_face.packed_tensors import StoredFormat
from checkpoints.hugging_face.quantization_config import read_packing
from checkpoints.hugging_face.safetensors_files import SafetensorsFiles
from checkpoints.hugging_face.text_names import find_text_names, image_tensors
from checkpoints.hugging_face.tokenizer_json import read_tokenizer
from checkpoints.json_file import read_json
from checkpoints.maker import make_parameters
from checkpoints.parameters import ParameterPath, tensor_shapes
from checkpoints.tensor_names import HUGGING_FACE_LAYER, Place, tensor_places
from jaxinfer.config import TokenizerJson
from jaxinfer.models import declared_parameters, family, read_config
from jaxinfer.request import Ending, SamplingParams
from jaxinfer.weights import Integers

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20

# Buffers that older versions of transformers saved with the weights.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.self_attn\.masked_bias")


class HuggingFaceCheckpoint:
    """A folder opened for loading: ``model``, ``tokenizer`` and ``tensor(name)``.

    Raises ``ValueError`` when files are missing or damaged, or describe a model that is not
    supported.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.quantization = folder, PLAIN
        config = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
        try:
            packing = read_packing(config)
            self.model = read_config(config)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error
        self._config = config
        self._files = SafetensorsFiles(folder)
        self._packed = PackedFiles(self._files, packing)
        self._images = image_tensors(self._files.shapes())
        self._check_counts()
        self._family = family(self.model.architecture)
        self._shapes = tensor_shapes(declared_parameters(self.model))
        self._places = self._find_places()
        self._check_tensors()

    @property
    def tokenizer(self) -> TokenizerJson:
        """The tokenizer. Raises ``ValueError`` when there is none or it is not supported."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> TokenizerJson:
        text = self._config.get("text_config", {})
        given = {name: value for name, value in text.items() if value is not None}
        return read_tokenizer(self.path, self.model.vocab_size, {**self._config, **given})

    @property
    def default_sampling(self) -> SamplingParams:
        """The sampling of generation_config.json. Raises ``ValueError`` when that cannot be."""
        return self._generation.sampling

    @property
    def default_ending(self) -> Ending:
        """The ends of texts of generation_config.json. Raises as ``default_sampling``."""
        return self._generation.ending

    @property
    def notes(self) -> tuple[str, ...]:
        """Tells of tensors that are left out, and of generation_config.json what is not done."""
        notes, unread = list[str](), self._generation.unread
        if self._images:
            count, first = len(self._images), min(self._images)
            notes.append(
                f"{self.path}: {count} tensors for images are left out, {first!r} the first"
            )
        if unread:
            notes.append(f"{self.path / GENERATION_CONFIG}: not in effect: {', '.join(unread)}")
        return tuple(notes)

    @cached_property
    def _generation(self) -> Generation:
        return read_generation(self.path, self.model.vocab_size)

    def tensor(self, name: str) -> np.ndarray:
        """Returns a tensor as float32, ``[out, in]``, by its canonical name, see tensor_names.

        Raises ``ValueError`` for a name that the model has not.
        """
        if name not in self._places:
            raise ValueError(f"no tensor {name!r} in {self.path}")
        place = self._places[name]
        parts = [self._read(file_name, place) for file_name in place.names]
        tensor = parts[0] if len(self._shapes[name]) < 3 else np.stack(parts)
        if name.endswith("norm") and self._family.norm_offset:
            tensor += np.float32(self._family.norm_offset)
        return tensor

    @property
    def tensors(self) -> "HuggingFaceCheckpoint":
        """Its own."""
        return self

    @property
    def rounding(self) -> Mapping[str, float]:
        """Nothing is rounded: scales stay in their dtype."""
        return {}

    def load(self, wanted: Wanted) -> dict[ParameterPath, Any]:
        """Returns the parameters on their devices, see ``make_parameters``."""
        return make_parameters(self, wanted)

    def stored_format(self, name: str) -> StoredFormat | None:
        """Returns the format of a tensor's integers, None where it is of floats."""
        place = self._places[name]
        if not all(self._is_packed(file_name, place) for file_name in place.names):
            return None
        forms = {self._packed.stored_format(file_name, place.shape) for file_name in place.names}
        return forms.pop() if len(forms) == 1 else None

    def integers(self, name: str) -> Integers:
        """Returns a tensor that has a format: ``[..., out, in]``, scales ``[..., out, groups]``."""
        place, form = self._places[name], self.stored_format(name)
        assert form is not None
        parts = [
            self._packed.read(file_name, place.shape, place.rows).integers(form)
            for file_name in place.names
        ]
        if len(self._shapes[name]) < 3:
            return parts[0]
        minimums = [part.minimums for part in parts if part.minimums is not None]
        return Integers(
            np.stack([part.values for part in parts]),
            np.stack([part.scales for part in parts]),
            np.stack(minimums) if minimums else None,
        )

    def _is_packed(self, name: str, place: Place) -> bool:
        return len(place.shape) == 2 and self._packed.is_packed(name)

    def _read(self, name: str, place: Place) -> np.ndarray:
        """The rows that are meant of a file's tensor, as float32."""
        if self._is_packed(name, place):
            return self._packed.read(name, place.shape, place.rows).dequantized()
        return self._files.read(name, place.rows)

    def _find_places(self) -> dict[str, Place]:
        try:
            names = find_text_names(self._files.shapes())
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        own = self._family.hugging_face
        return tensor_places(self._shapes, names.model, HUGGING_FACE_LAYER, own, names.layer_prefix)

    def _check_counts(self) -> None:
        """Every layer, and every expert of it, has a tensor: none is named that no file can have.

        Names are made for all of them, and a few bytes of a configuration may ask for billions.
        """
        model, found = self.model, len(self._files.shapes())
        if model.num_hidden_layers * max(1, model.num_experts) > found:
            experts = f" of {model.num_experts} experts" if model.num_experts else ""
            raise ValueError(
                f"{self.path}: {CONFIG} has {model.num_hidden_layers} layers{experts}, but there "
                f"are only {found} tensors"
            )

    def _check_tensors(self) -> None:
        """Every tensor the model needs is there in its shape, and there is no other."""
        found, known = self._files.shapes(), set[str]()
        for place in self._places.values():
            for name in place.names:
                if self._is_packed(name, place):
                    known |= self._packed.check(name, place.shape)
                    continue
                if name not in found:
                    raise ValueError(f"{self.path}: tensor {name!r} is missing")
                if found[name] != place.shape:
                    raise ValueError(
                        f"{self.path}: tensor {name!r} has shape {found[name]}, the model "
                        f"needs {place.shape}"
                    )
                self._files.check_dtype(name)
                known.add(name)
        self._check_tied_head(found)
        unknown = sorted(
            name
            for name in found.keys() - known - set(self._images)
            if not _IGNORED.fullmatch(name)
            and not self._packed.is_empty_bias(name)
            # Tied, and saved all the same.
            and not (self.model.tie_word_embeddings and name.endswith("lm_head.weight"))
        )
        if unknown:
            raise ValueError(
                f"{self.path}: {len(unknown)} tensors that a {self.model.architecture} model "
                f"does not have, {unknown[0]!r:.120} the first"
            )

    def _check_tied_head(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """A head that is tied and saved all the same is the embedding: else one of them is lost."""
        head = next((name for name in found if name.endswith("lm_head.weight")), None)
        if not self.model.tie_word_embeddings or head is None:
            return
        (embedding,) = self._places["embed_tokens"].names
        if found[head] == found.get(embedding) and self._files.are_equal(head, embedding):
            return
        raise ValueError(
            f"{self.path}: {CONFIG} has tie_word_embeddings, but {head!r} is not {embedding!r}: "
            "set it to false if the head counts, or remove that tensor"
        )
