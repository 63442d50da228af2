"""A GGUF file, or the several that llama.cpp's gguf-split made of one, as one.

The first shard has all metadata; every shard has tensors of its own, and says which shard of how
many it is. All are mapped, none is copied.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

from checkpoints.gguf.file import MAX_TENSORS, GGUFFile, MetadataValue, TensorInfo
from checkpoints.gguf.metadata import metadata_value
from checkpoints.shard_name import MAX_SHARDS, ShardName, parse_shard_name

_NUMBER, _COUNT, _NUM_TENSORS = "split.no", "split.count", "split.tensors.count"
# What a shard says of itself alone.
_OWN_KEYS = (_NUMBER, "general.alignment")


class GGUFFiles:
    """The same as a ``GGUFFile``, of one file or of a whole split set by its first shard.

    Raises ``ValueError`` in one line naming the file: damaged, not the first shard, a shard that is
    missing or belongs elsewhere. The files must not be truncated while this object lives.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = GGUFFile(path)
        self.metadata: Mapping[str, MetadataValue] = first.metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, GGUFFile] = {}
        self._add(first)
        for shard in self._later_shards(first):
            self._add(shard)
        wanted = _integer(first, _NUM_TENSORS, len(self.tensors))
        if len(self.tensors) != wanted:
            _refuse(path, f"{_NUM_TENSORS} is {wanted}, but there are {len(self.tensors)} tensors")

    def tensor_bytes(self, name: str) -> np.ndarray:
        """Returns uint8 ``[rows, bytes of a row]`` as stored, a view of a mapped file.

        Raises ``KeyError`` for a name that is not in ``tensors``.
        """
        return self._file_of[name].tensor_bytes(name)

    def _add(self, file: GGUFFile) -> None:
        for name, info in file.tensors.items():
            if name in self.tensors:
                other = self._file_of[name].path.name
                _refuse(file.path, f"tensor {name!r} is in {other} too")
            self.tensors[name] = info
            self._file_of[name] = file
        if len(self.tensors) > MAX_TENSORS:
            _refuse(file.path, f"more than {MAX_TENSORS} tensors in all files so far")

    def _later_shards(self, first: GGUFFile) -> Iterator[GGUFFile]:
        count = _integer(first, _COUNT, 1)
        if not 0 <= count <= MAX_SHARDS:
            _refuse(first.path, f"{_COUNT} must be in [0, {MAX_SHARDS}], got {count}")
        if count <= 1:
            return
        name = _checked_name(first, count)
        if name.number != 1:
            _refuse(first.path, f"shard {name.number} of {count}: give the first, {name.first}")
        for shard in name.all[1:]:
            file = _open_shard(first.path.with_name(str(shard)), shard)
            if _integer(file, _COUNT) != count:
                _refuse(file.path, f"{_COUNT} is {file.metadata[_COUNT]}, but {count} in {name}")
            _checked_name(file, count)
            self._check_metadata(file)
            yield file

    def _check_metadata(self, shard: GGUFFile) -> None:
        """A later shard repeats what the first one says, or is of another model."""
        for key, value in shard.metadata.items():
            mine = self.metadata.get(key)
            if key not in _OWN_KEYS and not _are_equal(mine, value):
                _refuse(shard.path, f"{key!r} is not what {self.path.name} says: another model?")


def _open_shard(path: Path, shard: ShardName) -> GGUFFile:
    # A pipe would be waited for.
    if not path.is_file():
        problem = "not a regular file" if path.exists() else "no such file"
        _refuse(path, f"{problem}: shard {shard.number} of {shard.count}")
    try:
        return GGUFFile(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _checked_name(file: GGUFFile, count: int) -> ShardName:
    """The parts of the file's name, which must say what its metadata says."""
    number = _integer(file, _NUMBER)
    name = parse_shard_name(file.path.name)
    if name is None or name.count != count:
        pattern = ShardName("NAME", number + 1, count)
        _refuse(file.path, f"{_COUNT} is {count}, so its name must be {pattern}")
    if number != name.number - 1:
        _refuse(
            file.path,
            f"{_NUMBER} is {number}, but by its name it must be {name.number - 1}: renamed?",
        )
    return name


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    try:
        return metadata_value(file.metadata, key, int, default)
    except ValueError as error:
        _refuse(file.path, str(error))


def _are_equal(mine: MetadataValue | None, value: MetadataValue) -> bool:
    if isinstance(mine, np.ndarray) and isinstance(value, np.ndarray):
        return np.array_equal(mine, value)
    return type(mine) is type(value) and bool(mine == value)


def _refuse(path: Path, problem: str) -> NoReturn:
    raise ValueError(f"{path}: {problem}")
