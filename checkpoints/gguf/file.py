"""The GGUF container, versions 2 and 3: typed metadata and tensors' places, nothing of any model.

A file is hostile until checked: every count, length, offset and size is compared with the bytes
that are there before anything is allocated for it. Little-endian only. Layout as in the GGUF
specification of ggml (``docs/gguf.md``).
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from checkpoints.gguf.blocks import TENSOR_TYPES, UNSUPPORTED_TENSOR_TYPES, TensorType

MAGIC = b"GGUF"

# Far above what models have; each is checked beside the size of the file.
MAX_METADATA_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_STRINGS = 1 << 22  # in all arrays of the file together: tokens and merges
MAX_KEY_BYTES = 65535
MAX_TENSOR_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

# Strings and arrays of strings become tuples; arrays of numbers become numpy arrays.
MetadataValue = bool | int | float | str | tuple[str, ...] | np.ndarray


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place. ``shape`` is in numpy's order, rows last; ``start`` in the file."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    start: int
    num_bytes: int


class GGUFFile:
    """A memory-mapped GGUF file whose structure has been checked as a whole.

    Raises ``ValueError`` naming the value and the limit when the file is not sound, ``OSError``
    when it cannot be opened. The file must not be truncated while this object lives.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise ValueError(f"{path}: {size} bytes is too short for a GGUF file (24 at least)")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 0
        self._num_strings = 0
        self._read_header()
        self.metadata: dict[str, MetadataValue] = {}
        for _ in range(self._num_keys):
            self._read_key()
        self.tensors: dict[str, TensorInfo] = {}
        self._read_tensor_infos()

    def tensor_bytes(self, name: str) -> np.ndarray:
        """Returns uint8 ``[rows, bytes of a row]`` as stored, a view of the mapped file.

        Raises ``KeyError`` for a name that is not in ``tensors``.
        """
        info = self.tensors[name]
        num_rows = math.prod(info.shape[:-1])
        data = np.frombuffer(self._data, np.uint8, info.num_bytes, info.start)
        return data.reshape(num_rows, info.num_bytes // num_rows)

    # Below: one pass over the file, self._position always within it.

    def _refuse(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.path}: {problem}")

    def _limit(self, what: str, value: int, limit: int) -> int:
        if value > limit:
            self._refuse(f"{what} is {value}, more than the limit of {limit}")
        return value

    def _take(self, num_bytes: int, what: str) -> int:
        """Returns the position of the next ``num_bytes`` and moves past them."""
        start = self._position
        self._need(start + num_bytes, what)
        self._position = start + num_bytes
        return start

    def _need(self, end: int, what: str) -> None:
        """Refuses a file that has not ``end`` bytes, up to which ``what`` goes."""
        size = len(self._data)
        if end > size:
            self._refuse(
                f"the file is cut off or damaged: expected at least {end} bytes, up to the end of "
                f"{what}, found {size}"
            )

    def _unsigned(self, num_bytes: int, what: str) -> int:
        start = self._take(num_bytes, what)
        return int.from_bytes(self._data[start : start + num_bytes], "little")

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._unsigned(8, f"the length of {what}")
        if limit is not None:
            self._limit(f"the length of {what}", length, limit)
        start = self._take(length, what)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError as error:
            self._refuse(f"{what} at {start} is not UTF-8: {error.reason}")

    def _read_header(self) -> None:
        magic = self._data[:4]
        self._position = 4
        if magic == MAGIC[::-1]:
            self._refuse("a big-endian GGUF file; only little-endian ones are supported")
        if magic != MAGIC:
            self._refuse(f"starts with {magic!r}, a GGUF file starts with {MAGIC!r}")
        version = self._unsigned(4, "the version")
        if version not in (2, 3):
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
                self._refuse("a big-endian GGUF file; only little-endian ones are supported")
            self._refuse(f"GGUF version {version}; versions 2 and 3 are supported")
        num_tensors = self._unsigned(8, "the tensor count")
        num_keys = self._unsigned(8, "the metadata count")
        self._limit("the tensor count", num_tensors, MAX_TENSORS)
        self._limit("the metadata count", num_keys, MAX_METADATA_KEYS)
        # Smallest entries: a tensor is 8 + 0 + 4 + 8 + 4 + 8 bytes, a key 8 + 0 + 4 + 1.
        counted = f"a header of {num_keys} keys and {num_tensors} tensors"
        self._need(self._position + 32 * num_tensors + 13 * num_keys, counted)
        self._num_tensors, self._num_keys = num_tensors, num_keys

    def _read_key(self) -> None:
        key = self._string("a metadata key", MAX_KEY_BYTES)
        if key in self.metadata:
            self._refuse(f"metadata key {key!r} occurs twice")
        kind = self._unsigned(4, f"the type of {key!r}")
        self.metadata[key] = self._value(kind, repr(key))

    def _value(self, kind: int, what: str) -> MetadataValue:
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _NUMBERS:
            self._refuse(f"{what} has metadata type {kind}; types 0 to 12 exist")
        numbers = self._numbers(kind, 1, what)
        return numbers[0].item()

    def _array(self, what: str) -> tuple[str, ...] | np.ndarray:
        kind = self._unsigned(4, f"the element type of {what}")
        count = self._unsigned(8, f"the length of {what}")
        if kind == _ARRAY:
            self._refuse(f"{what} is an array of arrays, which is not supported")
        if kind == _STRING:
            return self._strings(count, what)
        if kind not in _NUMBERS:
            self._refuse(f"{what} has element type {kind}; types 0 to 12 exist")
        return self._numbers(kind, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        dtype = _NUMBERS[kind]
        start = self._take(count * dtype.itemsize, what)
        if kind == _BOOL:
            return np.frombuffer(self._data, np.uint8, count, start) != 0
        return np.frombuffer(self._data, dtype, count, start).copy()

    def _strings(self, count: int, what: str) -> tuple[str, ...]:
        self._num_strings += count
        self._limit("the number of strings in all arrays", self._num_strings, MAX_STRINGS)
        self._need(self._position + 8 * count, f"an array of {count} strings in {what}")
        # The checks of _string in a tight loop: a vocabulary and its merges are 100,000 strings.
        data, position, end = self._data, self._position, len(self._data)
        read_length = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                if end - position < 8:
                    self._need(position + 8, what)
                (length,) = read_length(data, position)
                position += 8
                if length > end - position:
                    self._need(position + length, f"a string in {what}")
                strings.append(data[position : position + length].decode())
                position += length
        except UnicodeDecodeError as error:
            self._refuse(f"a string in {what} at {position} is not UTF-8: {error.reason}")
        self._position = position
        return tuple(strings)

    def _read_tensor_infos(self) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 8 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            self._refuse(
                f"general.alignment must be a power of two in [8, {MAX_ALIGNMENT}], "
                f"got {alignment!r:.40}"
            )
        relative = [self._read_tensor_info() for _ in range(self._num_tensors)]
        data_start = -(-self._position // alignment) * alignment
        end, previous = data_start, "the header"
        for info in sorted(relative, key=lambda info: info.start):
            start = data_start + info.start
            if info.start % alignment:
                self._refuse(
                    f"tensor {info.name!r} has offset {info.start}, "
                    f"not a multiple of the alignment {alignment}"
                )
            if start < end:
                self._refuse(f"tensor {info.name!r} at {start} overlaps {previous}, up to {end}")
            end, previous = start + info.num_bytes, f"tensor {info.name!r}"
        self._need(end, previous)
        for info in relative:
            if info.name in self.tensors:
                self._refuse(f"tensor {info.name!r} occurs twice")
            self.tensors[info.name] = replace(info, start=data_start + info.start)

    def _read_tensor_info(self) -> TensorInfo:
        """Returns an info whose ``start`` is still relative to the data section."""
        name = self._string("a tensor name", MAX_TENSOR_NAME_BYTES)
        num_dimensions = self._unsigned(4, f"the number of dimensions of {name!r}")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            self._refuse(
                f"tensor {name!r} has {num_dimensions} dimensions, 1 to {MAX_DIMENSIONS} can be"
            )
        sizes = [self._unsigned(8, f"a dimension of {name!r}") for _ in range(num_dimensions)]
        shape = tuple(reversed(sizes))  # GGML counts dimensions from the innermost
        number = self._unsigned(4, f"the type of {name!r}")
        offset = self._unsigned(8, f"the offset of {name!r}")
        tensor_type = TENSOR_TYPES.get(number)
        if tensor_type is None:
            supported = ", ".join(sorted(known.name for known in TENSOR_TYPES.values()))
            self._refuse(
                f"tensor {name!r} has type {UNSUPPORTED_TENSOR_TYPES.get(number, number)}; "
                f"supported are {supported}"
            )
        if 0 in shape:
            self._refuse(f"tensor {name!r} has shape {shape}; every dimension must be at least 1")
        if shape[-1] % tensor_type.block_elements:
            self._refuse(
                f"tensor {name!r} has rows of {shape[-1]} elements, not a multiple of the "
                f"{tensor_type.block_elements} in a block of {tensor_type.name}"
            )
        num_bytes = math.prod(shape) // tensor_type.block_elements * tensor_type.block_bytes
        return TensorInfo(name, shape, tensor_type, offset, num_bytes)
