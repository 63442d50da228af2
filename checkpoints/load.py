"""The way from a file on disk to parameters on devices: its form found, what is wanted checked.

Knows no module: the abstract parameters say what is wanted, by path.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints.checkpoint import Checkpoint, Loadable, Progress, Wanted
from checkpoints.converted.checkpoint import DESCRIPTION, OrbaxCheckpoint
from checkpoints.gguf.checkpoint import GGUFCheckpoint
from checkpoints.gguf.file import MAGIC
from checkpoints.hugging_face.checkpoint import CONFIG, HuggingFaceCheckpoint
from checkpoints.parameters import ParameterPath
from checkpoints.shard_name import without_later_shards
from jaxinfer.config import ModelConfig
from jaxinfer.models import declared_parameters
from jaxinfer.sharding import physical_model, physical_shape
from jaxinfer.weights import QuantizedWeight

__all__ = ["Checkpoint", "load_parameters", "open_checkpoint"]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a checkpoint: a folder by what is in it, a file by its first bytes.

    Raises ``ValueError`` in one line: no such file, unknown format, damaged, not supported.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.is_file():
            raise ValueError(f"{path}: a device or a pipe, no checkpoint")
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
        if start in (MAGIC, MAGIC[::-1]):
            return GGUFCheckpoint(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    raise ValueError(
        f"{path}: unknown checkpoint format, starts with {start!r}; supported are GGUF files "
        f"({MAGIC!r}), Hugging Face folders and what convert.py writes"
    )


def _open_folder(path: Path) -> Checkpoint:
    if (path / DESCRIPTION).exists():
        return OrbaxCheckpoint(path)
    if (path / CONFIG).exists():
        return HuggingFaceCheckpoint(path)
    files = without_later_shards(file.name for file in path.glob("*.gguf"))
    hint = f"; give {path / files[0]}" if files else ""
    raise ValueError(
        f"{path}: neither {CONFIG} (a Hugging Face folder) nor {DESCRIPTION} (a converted one) "
        f"is in it{hint}"
    )


def load_parameters(
    checkpoint: Loadable,
    abstract: Mapping[Any, Any],
    progress: Progress | None = None,
    num_devices: int = 1,
    quantized: Mapping[ParameterPath, QuantizedWeight] = MappingProxyType({}),
    stored: bool = False,
) -> dict[Any, Any]:
    """Returns parameters in the structure, shapes, dtypes and shardings of ``abstract``.

    ``abstract`` is a nested dict (list indices are int keys) of ``jax.ShapeDtypeStruct``, the
    parameters of the model's own module, whose declarations say what each is made of.
    A matrix in ``quantized`` is a dict there, of the arrays that its declaration makes: rounded
    here, or with ``stored`` the integers that the checkpoint has (see stored.py). A converted
    folder that has them gives no others.

    ``num_devices`` is what ``abstract`` was made for: its shapes are those of ``physical_model``,
    and heads are repeated and ends padded with zeros accordingly.
    ``progress(done, total)`` is called in this thread after each parameter. Raises ``ValueError``
    naming the paths that are missing, unknown, of another shape, or not finite (and their file).
    """
    arrays: dict[ParameterPath, Any] = dict(_leaves(abstract, (), quantized))
    _check_paths(arrays, checkpoint.model, num_devices, quantized)
    wanted = Wanted(arrays, num_devices, quantized, stored, progress)
    return _like(abstract, (), checkpoint.load(wanted))


def _leaves(tree: Any, path: ParameterPath, quantized: Mapping[ParameterPath, QuantizedWeight]):
    """Arrays by their paths; a quantized matrix is one, with all that it has."""
    if isinstance(tree, Mapping) and path not in quantized:
        for key, value in tree.items():
            yield from _leaves(value, (*path, key), quantized)
    else:
        yield path, tree


def _like(tree: Any, path: ParameterPath, leaves: Mapping[ParameterPath, Any]) -> Any:
    if path in leaves:
        return leaves[path]
    return {key: _like(value, (*path, key), leaves) for key, value in tree.items()}


def _check_paths(
    wanted: Mapping[ParameterPath, Any],
    model: ModelConfig,
    num_devices: int,
    quantized: Mapping[ParameterPath, QuantizedWeight],
) -> None:
    physical = physical_model(model, num_devices)
    expected = declared_parameters(model)
    for path in wanted:
        if path not in expected:
            raise ValueError(f"the checkpoint has nothing for parameter {path}")
    for path, declared in expected.items():
        shape = physical_shape(declared.axes, declared.shape, physical)
        if path not in wanted:
            raise ValueError(f"the model lacks parameter {path}, which the checkpoint has")
        if path in quantized:
            continue
        if tuple(wanted[path].shape) != shape:
            raise ValueError(
                f"parameter {path} has shape {tuple(wanted[path].shape)}, "
                f"the checkpoint gives {shape}"
            )
        if wanted[path].dtype not in _DTYPES:
            names = ", ".join(np.dtype(dtype).name for dtype in _DTYPES)
            raise ValueError(
                f"parameter {path} has dtype {wanted[path].dtype}; supported are {names}"
            )
