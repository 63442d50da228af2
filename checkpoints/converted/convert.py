"""Any checkpoint as a converted one: its parameters made once, and where they come from."""

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.calibration import Calibration, calibrate
from checkpoints.checkpoint import PLAIN, Checkpoint, Progress, Quantization
from checkpoints.converted.checkpoint import Described, write_checkpoint
from checkpoints.maker import Maker, make_all
from checkpoints.parameters import ParameterPath
from checkpoints.shard_name import with_later_shards
from jaxinfer.config import STORED
from jaxinfer.models import parameter_shapes, quantized_weights

# What is looked at of a folder.
_SOURCES = ("*.json", "*.jinja", "*.safetensors")
_LIBRARIES = ("jaxinfer", "jax", "orbax-checkpoint")


@dataclass(frozen=True)
class Rounding:
    """Formats of matrices, and the text that is in view while they are rounded, if any."""

    quantization: Quantization = PLAIN
    calibration: Calibration | None = None


def convert(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: np.dtype,
    provenance: dict[str, Any],
    progress: Progress | None = None,
    rounding: Rounding | None = None,
) -> None:
    """Writes ``checkpoint`` as a converted folder with parameters in ``dtype``.

    Matrices are in the formats of ``rounding``. The host holds all parameters meanwhile.
    ``progress(done, total)`` counts them, in a calibration layers afterwards. Raises ``ValueError``
    for values that are not finite, in ``dtype`` too, for what cannot be calibrated, for a
    checkpoint that is a converted one, and where ``folder`` exists.
    """
    rounding = rounding or Rounding()
    quantization, calibration = rounding.quantization, rounding.calibration
    tensors = checkpoint.tensors
    if tensors is None:
        raise ValueError("parameters that have been converted are not converted again")
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    quantized = quantized_weights(model, quantization.policy)
    stored = quantization.name == STORED
    maker = Maker(tensors, {} if calibration else quantized, stored)

    def make(path: ParameterPath) -> Any:
        return maker.make(path, np.dtype(np.float32) if calibration else dtype)

    parameters = make_all(make, parameter_shapes(model), progress)
    if calibration is not None:
        parameters = calibrate(model, parameters, quantized, calibration, progress)
    for path, made in parameters.items():
        if not isinstance(made, Mapping):
            parameters[path] = _in_dtype(path, made, dtype)
    sampling, ending = checkpoint.default_sampling, checkpoint.default_ending
    described = Described(model, tokenizer, sampling, provenance, quantization, ending)
    write_checkpoint(folder, described, parameters)


def _in_dtype(path: ParameterPath, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"parameter {path} has values that are not finite in {dtype.name}")
    return array


def provenance(source: str, path: Path, dtype: np.dtype, progress: Progress | None = None):
    """Describes where a conversion comes from: files with their SHA-256, versions, the time.

    ``source`` is what the user named, ``path`` where it lies. ``progress(done, total)`` counts
    bytes.
    """
    if path.is_file():
        files = with_later_shards(path)
    else:
        files = sorted(f for kind in _SOURCES for f in path.glob(kind))
    total, done, hashes = sum(file.stat().st_size for file in files), 0, {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(8 << 20):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
        hashes[file.name] = {"sha256": digest.hexdigest(), "bytes": file.stat().st_size}
    return {
        "source": source,
        "name": path.name,  # of a model of the hub, the commit
        "files": hashes,
        "dtype": dtype.name,
        "versions": {library: _version(library) for library in _LIBRARIES},
        "converted_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "unknown"
