"""The safetensors files of a folder, one or many with an index, as tensors by name.

The library checks a file's header against its size: lengths, offsets, shapes and types. What an
index says is checked here.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoints.json_file import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
_PLAIN_NAME = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
# Endings of files with weights, those included that are not read.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
DTYPES = ("F32", "F16", "BF16")
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_COMPARED_NUMBERS = 1 << 22


class _Tensor(NamedTuple):
    file: Any
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFiles:
    """Tensors of a folder, memory-mapped. Raises ``ValueError`` when they are not sound."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, _Tensor] = {}
        if (folder / INDEX).exists():
            placed = self._read_index()
        elif (folder / SINGLE).exists():
            placed = None
            self._open(SINGLE)
        else:
            raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX}{_found(folder)}")
        for name, file_name in (placed or {}).items():
            if name not in self._tensors:
                raise ValueError(f"{folder / INDEX}: tensor {name!r:.80} is not in {file_name}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> str:
        """Returns a tensor's dtype, as the format calls it."""
        return self._tensors[name].dtype

    def check_dtype(self, name: str) -> None:
        """Raises ``ValueError`` for a tensor that cannot be read: of other numbers than floats."""
        dtype = self._tensors[name].dtype
        if dtype not in DTYPES:
            raise ValueError(
                f"{self.folder}: tensor {name!r} has type {dtype}; supported are "
                f"{', '.join(DTYPES)}"
            )

    def read(self, name: str, rows: slice) -> np.ndarray:
        """``rows`` of a tensor as float32."""
        tensor = self._tensors[name]
        if rows == slice(0, tensor.shape[0]):
            return tensor.file.get_tensor(name).astype(np.float32)
        return tensor.file.get_slice(name)[rows].astype(np.float32)

    def read_stored(self, name: str) -> np.ndarray:
        """A whole tensor in the dtype it has."""
        return self._tensors[name].file.get_tensor(name)

    def are_equal(self, one: str, other: str) -> bool:
        """Tells if two tensors of one shape have the same numbers; a part at a time is read."""
        step = max(1, _COMPARED_NUMBERS // max(1, math.prod(self._tensors[one].shape[1:])))
        num_rows = self._tensors[one].shape[0]
        rows = [slice(n, min(n + step, num_rows)) for n in range(0, num_rows, step)]
        return all(np.array_equal(self.read(one, part), self.read(other, part)) for part in rows)

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        placed = read_json(path, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise ValueError(f"{path}: weight_map must be an object with an entry a tensor")
        for file_name in {str(name): None for name in placed.values()}:
            # A plain name: an index must not lead out of its folder.
            if not _PLAIN_NAME.fullmatch(file_name):
                raise ValueError(f"{path}: {file_name!r:.80} is no name of a safetensors file")
            self._open(file_name)
        return placed

    def _open(self, file_name: str) -> None:
        path = self.folder / file_name
        if not path.is_file():
            raise ValueError(f"{path}: no such file, or not a regular one")
        try:
            file = safe_open(path, framework="numpy")
            names = file.keys()  # the file itself is no mapping
            for name in names:
                if name in self._tensors:
                    raise ValueError(f"{path}: tensor {name!r:.80} is in another file too")
                part = file.get_slice(name)
                self._tensors[name] = _Tensor(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            if (expected := _expected_bytes(path)) > (size := path.stat().st_size):
                raise ValueError(
                    f"{path}: the file is cut off: expected {expected} bytes, found {size}"
                ) from error
            # The library quotes the file at any length.
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: damaged or not fetched to the end: {reason}") from error


def _expected_bytes(path: Path) -> int:
    """Returns the size that a file's own header speaks of, 0 where there is none to be read."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                return 8
            length = int.from_bytes(start, "little")
            if length > _MAX_HEADER_BYTES:
                return 0
            header = file.read(length)
        if len(header) < length:
            return 8 + length
        tensors = json.loads(header)
        ends = [one["data_offsets"][1] for name, one in tensors.items() if name != "__metadata__"]
        return 8 + length + int(max(ends, default=0))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0


def _found(folder: Path) -> str:
    """Says which other files of weights are there, and what to do about them."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
    if not names:
        return " is in it, and no other file of weights"
    found = f"; found {len(names)} files, {names[0]!r:.80} the first"
    if any(_SHARD.fullmatch(name) for name in names):
        return f"{found}: shards without their index, fetch {INDEX} too"
    if any(name.startswith("adapter_model.") for name in names):
        return f"{found}: an adapter, merge it into its model first"
    if any(name.startswith("consolidated") for name in names):
        return f"{found}: names of another format, give the model as transformers saves it"
    if all(name.endswith(".safetensors") for name in names):
        return f"{found}: one file must be called {SINGLE}"
    return f"{found}; formats other than safetensors are not read"
