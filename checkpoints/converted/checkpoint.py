"""Converted checkpoints: parameters by Orbax, beside them what they are and where they come from.

A folder of three: ``jaxinfer.json`` (the model's configuration, its default sampling, provenance),
``vocabulary.json`` (the tokenizer) and ``parameters``, an Orbax checkpoint of the modules' own
parameters in their logical shapes. They are read in pieces, each straight to the device that wants
it, whatever mesh that is in.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.checkpoint import PLAIN, Quantization, Wanted
from checkpoints.converted.dataclass_json import from_json, to_json
from checkpoints.converted.quantization import quantization_from_json, quantization_to_json
from checkpoints.json_file import read_json
from checkpoints.maker import physical_integers
from checkpoints.parameters import ParameterPath
from checkpoints.token_rows import check_token_rows
from jaxinfer.config import (
    AnyTokenizer,
    ModelConfig,
    SentencePieceSpec,
    TokenizerJson,
    TokenizerSpec,
)
from jaxinfer.models import declared_parameters, quantized_weights
from jaxinfer.models.fields import MAX_LAYERS
from jaxinfer.request import Ending, SamplingParams
from jaxinfer.sharding import physical_model, physical_parameter, place
from jaxinfer.weights import QuantizedWeight

DESCRIPTION, VOCABULARY, PARAMETERS = "jaxinfer.json", "vocabulary.json", "parameters"
FORMAT = 1
MAX_DESCRIPTION_BYTES = 16 << 20
MAX_VOCABULARY_BYTES = 256 << 20
# A device that wants a part of a parameter reads no more than these bytes besides.
_CHUNK_BYTES = 16 << 20

_PARAMETER_FILES = ("_METADATA", "manifest.ocdbt", "d", "ocdbt.process_0/manifest.ocdbt")

_TOKENIZERS: Mapping[str, type[TokenizerSpec | SentencePieceSpec | TokenizerJson]] = {
    "byte_level": TokenizerSpec,
    "sentence_piece": SentencePieceSpec,
    "tokenizer_json": TokenizerJson,
}


class OrbaxCheckpoint:
    """A converted folder opened for loading: ``model``, ``tokenizer``, ``load``.

    Raises ``ValueError`` when files are missing or damaged, or do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / DESCRIPTION
        fields = read_json(path, MAX_DESCRIPTION_BYTES)
        if fields.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format must be {FORMAT}, got {fields.get('format')!r:.40}: written by "
                "another version?"
            )
        with _named(path):
            self.model = from_json(ModelConfig, fields.get("model"), "model")
            self.default_sampling = from_json(
                SamplingParams, fields.get("default_sampling"), "default_sampling"
            )
            # Folders of before have none.
            ending = fields.get("default_ending", {"stop": [], "min_tokens": 0})
            self.default_ending = from_json(Ending, ending, "default_ending")
            if self.model.num_hidden_layers > MAX_LAYERS:
                raise ValueError(
                    f"model.num_hidden_layers must be at most {MAX_LAYERS}, got "
                    f"{self.model.num_hidden_layers}"
                )
            self.quantization = PLAIN
            if "quantization" in fields:
                self.quantization = quantization_from_json(fields["quantization"])
            self._declared = declared_parameters(self.model)
        self.provenance: dict[str, Any] = fields.get("provenance", {})
        self._check_parameters()

    @property
    def tokenizer(self) -> AnyTokenizer:
        """The tokenizer. Raises ``ValueError`` when its file is missing or damaged."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> AnyTokenizer:
        path = self.folder / VOCABULARY
        fields = read_json(path, MAX_VOCABULARY_BYTES)
        kind = fields.pop("kind", None)
        if not isinstance(kind, str) or kind not in _TOKENIZERS:
            raise ValueError(f"{path}: kind must be one of {', '.join(_TOKENIZERS)}")
        try:
            spec = from_json(_TOKENIZERS[kind], fields, "tokenizer")
            _check_token_ids(spec, self.model.vocab_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return spec

    @property
    def tensors(self) -> None:
        """None: parameters have been made of them."""
        return

    @property
    def rounding(self) -> Mapping[str, float]:
        """Nothing is rounded."""
        return {}

    @property
    def notes(self) -> tuple[str, ...]:
        """None: what was left out was told of before."""
        return ()

    def load(self, wanted: Wanted) -> dict[ParameterPath, Any]:
        """Returns the parameters on their devices, read a layer at a time.

        Quantized matrices are the arrays of the folder, or, where it has floats, what they are
        rounded to. These, and what devices hold in another shape than the logical one (heads
        repeated, ends padded), go through the host, all else does not. Raises ``ValueError``
        naming a parameter that is damaged or not finite.
        """
        physical, progress = physical_model(self.model, wanted.num_devices), wanted.progress
        groups: dict[tuple[str | int, ...], list[ParameterPath]] = {}
        for path in wanted.arrays:
            groups.setdefault(path[:2] if path[0] == "layers" else path[:1], []).append(path)
        loaded: dict[ParameterPath, Any] = {}
        with _checkpointer() as checkpointer:
            for paths in groups.values():
                arrays = {path: wanted.arrays[path] for path in paths}
                read = self._read(checkpointer, arrays)
                for path, array in arrays.items():
                    made = self._physical(path, read[path], physical, wanted.quantized.get(path))
                    loaded[path] = jax.tree.map(place, made, array)
                    if not all(map(_is_finite, jax.tree.leaves(loaded[path]))):
                        raise ValueError(
                            f"{self.folder}: parameter {path} has values that are not finite: a "
                            "damaged checkpoint?"
                        )
                    if progress:
                        progress(len(loaded), len(wanted.arrays))
        return loaded

    def _physical(
        self,
        path: ParameterPath,
        read: Any,
        physical: ModelConfig,
        weight: QuantizedWeight | None,
    ) -> Any:
        """Returns what was read of a parameter as it is wanted: itself, if on a device."""
        if isinstance(jax.tree.leaves(read)[0], jax.Array):
            return read
        axes = self._declared[path].axes
        if weight is not None and path in self._quantized:
            parts = self._quantized[path].integers(read)
            return weight.from_stored(physical_integers(axes, parts, weight, self.model, physical))
        array = physical_parameter(axes, read, self.model, physical)
        return array if weight is None else weight.quantize(array)

    def _read(
        self, checkpointer: Any, wanted: Mapping[ParameterPath, Any]
    ) -> dict[ParameterPath, Any]:
        import orbax.checkpoint as ocp

        def how(path: ParameterPath) -> Any:
            """Straight to devices where nothing is to be done with it, else to the host."""
            written = self._written(path)
            if jax.tree.structure(written) != jax.tree.structure(wanted[path]):
                return ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.dtype(np.float32))
            same = all(
                one.shape == other.shape
                for one, other in zip(
                    jax.tree.leaves(written), jax.tree.leaves(wanted[path]), strict=True
                )
            )
            return jax.tree.map(
                lambda leaf: (
                    ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, strict=True)
                    if same
                    else ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
                ),
                wanted[path],
            )

        zeros = {path: jax.tree.map(lambda _: 0, self._written(path)) for path in wanted}
        arguments = ocp.args.PyTreeRestore(
            item=_nested(zeros),
            restore_args=_nested({path: how(path) for path in wanted}),
            partial_restore=True,
        )
        try:
            tree = checkpointer.restore((self.folder / PARAMETERS).absolute(), args=arguments)
        # Orbax and tensorstore raise what they please for damaged files.
        except Exception as error:
            raise ValueError(
                f"{self.folder / PARAMETERS}: cannot be read: {_one_line(error)}"
            ) from error
        return {path: _at(tree, path) for path in wanted}

    def _written(self, path: ParameterPath) -> Any:
        """Shapes of what the folder has of a parameter: one array, or several by name.

        Dtypes too where they are integers.
        """
        if path not in self._quantized:
            return jax.ShapeDtypeStruct(self._declared[path].shape, np.float32)
        weight = self._quantized[path]
        return dict(jax.eval_shape(weight.quantize, jax.ShapeDtypeStruct(weight.shape, np.float32)))

    def _check_parameters(self) -> None:
        """Every parameter of the model is there in its shape; nothing is read or allocated."""
        folder = self.folder / PARAMETERS
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder: not copied to the end?")
        # Orbax opens all arrays at once, and complains of each where none can be opened.
        for name in _PARAMETER_FILES:
            if not (folder / name).exists():
                raise ValueError(f"{folder / name}: no such file: not copied to the end?")
        try:
            with _checkpointer() as checkpointer:
                tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
        except Exception as error:  # as above
            raise ValueError(f"{folder}: no Orbax checkpoint: {_one_line(error)}") from error
        found = {tuple(map(str, path)): leaf for path, leaf in _leaves(tree, ())}
        if self.model.num_hidden_layers > len(found):  # before a module is built for each
            raise ValueError(
                f"{folder}: {len(found)} arrays are too few for {self.model.num_hidden_layers} "
                "layers"
            )
        with _named(self.folder / DESCRIPTION):
            self._quantized = quantized_weights(self.model, self.quantization.policy)
        expected: dict[tuple[str, ...], jax.ShapeDtypeStruct] = {}
        for path in self._declared:
            for name, array in _leaves(self._written(path), path):
                expected[tuple(map(str, name))] = array
        for name in expected.keys() ^ found.keys():
            which = "is missing" if name in expected else "is not of this model"
            raise ValueError(f"{folder}: parameter {'.'.join(name)} {which}")
        for name, array in expected.items():
            if tuple(found[name].shape) != array.shape:
                raise ValueError(
                    f"{folder}: parameter {'.'.join(name)} has shape {tuple(found[name].shape)}, "
                    f"the model needs {array.shape}"
                )
            kind = np.dtype(found[name].dtype).kind
            if (kind in "iu") != (array.dtype.kind in "iu"):
                raise ValueError(
                    f"{folder}: parameter {'.'.join(name)} is {found[name].dtype}, the model "
                    f"needs {array.dtype}"
                )


@dataclass(frozen=True)
class Described:
    """A converted checkpoint without its parameters. ``provenance``: see ``convert.provenance``."""

    model: ModelConfig
    tokenizer: AnyTokenizer
    default_sampling: SamplingParams
    provenance: Mapping[str, Any]
    quantization: Quantization = PLAIN
    default_ending: Ending = field(default_factory=Ending)


def write_checkpoint(
    folder: Path,
    described: Described,
    parameters: Mapping[ParameterPath, np.ndarray | Mapping[str, np.ndarray]],
) -> None:
    """Writes ``folder``, which must not exist: whole, or not at all.

    ``parameters`` in their logical shapes, quantized matrices as their arrays by name. Raises
    ``ValueError`` when the folder exists or cannot be made, and ``OSError`` when it cannot be
    written.
    """
    import orbax.checkpoint as ocp

    if folder.exists():
        raise ValueError(f"{folder} exists: give another folder, or remove it")
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made: {error.strerror}") from error
    try:
        description = {
            "format": FORMAT,
            "model": to_json(described.model),
            "default_sampling": to_json(described.default_sampling),
            "default_ending": to_json(described.default_ending),
            "quantization": quantization_to_json(described.quantization),
            "provenance": dict(described.provenance),
        }
        tokenizer = described.tokenizer
        (kind,) = (kind for kind, of in _TOKENIZERS.items() if type(tokenizer) is of)
        _write_json(unfinished / DESCRIPTION, description, indent=1)
        _write_json(unfinished / VOCABULARY, {"kind": kind, **to_json(tokenizer)})
        tree = _nested(parameters)
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
        with _checkpointer() as checkpointer:
            checkpointer.save(
                (unfinished / PARAMETERS).absolute(),
                args=ocp.args.PyTreeSave(tree, save_args=save_args),
            )
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _checkpointer() -> Any:
    # Half a second to import, and only these folders need it.
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def _write_json(path: Path, fields: Mapping[str, Any], indent: int | None = None) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(fields, file, ensure_ascii=False, allow_nan=False, indent=indent)
        file.flush()
        os.fsync(file.fileno())


def _check_token_ids(spec: AnyTokenizer, vocab_size: int) -> None:
    unnamed = [i for i in range(vocab_size, len(spec.tokens)) if not spec.tokens[i]]
    special = (*spec.control_token_ids, *spec.added_token_ids, *unnamed)
    check_token_rows(len(spec.tokens), vocab_size, special)
    singles = () if spec.bos_token_id is None else (spec.bos_token_id,)
    if isinstance(spec, SentencePieceSpec):
        singles = (*singles, *spec.rstrip_token_ids, spec.unknown_token_id)
    for token_id in (
        *singles,
        *spec.control_token_ids,
        *spec.added_token_ids,
        *spec.eos_token_ids,
    ):
        if not 0 <= token_id < len(spec.tokens):
            raise ValueError(f"token id must be in [0, {len(spec.tokens) - 1}], got {token_id}")


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _is_finite(array: jax.Array) -> bool:
    return bool(_all_finite(array))


def _nested(leaves: Mapping[ParameterPath, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = map(str, path)
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return tree


def _at(tree: Mapping[str, Any], path: ParameterPath) -> Any:
    for key in path:
        tree = tree[str(key)]
    return tree


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the file's name before whatever is wrong with what it says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _leaves(tree: Any, path: tuple[str | int, ...]):
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
