"""Names of a split GGUF's files, as by llama.cpp's gguf-split: NAME-00001-of-00003.gguf.

Only names: nothing is opened here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

# Far above what is published (some 50); each open file takes one of the process's descriptors.
MAX_SHARDS = 512

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class ShardName:
    """``number`` counts from 1 to ``count``; ``stem`` may begin with folders."""

    stem: str
    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.stem}-{self.number:05}-of-{self.count:05}.gguf"

    @property
    def first(self) -> "ShardName":
        """The one that is given to open them all."""
        return replace(self, number=1)

    @property
    def all(self) -> list["ShardName"]:
        """Every shard's name, in order. ``count`` is checked by whoever asks."""
        return [replace(self, number=number) for number in range(1, self.count + 1)]


def parse_shard_name(name: str) -> ShardName | None:
    """The parts of a shard's name; None where it is not one."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    shard = ShardName(match["stem"], int(match["number"]), int(match["count"]))
    return shard if 1 <= shard.number <= shard.count else None


def without_later_shards(names: Iterable[str]) -> list[str]:
    """``names`` sorted, of each split file only the first shard: what a user may give."""
    shards = {name: parse_shard_name(name) for name in names}
    return sorted(name for name, shard in shards.items() if shard is None or shard.number == 1)


def file_stem(path: Path) -> str:
    """Returns what a model file is called, without ending and number of shard."""
    shard = parse_shard_name(path.name)
    return shard.stem if shard else path.stem


def with_later_shards(path: Path) -> list[Path]:
    """``path``, and the shards that lie beside it where it is the first of a split file."""
    shard = parse_shard_name(path.name)
    if shard is None or shard.number != 1 or shard.count > MAX_SHARDS:
        return [path]
    beside = (path.with_name(str(one)) for one in shard.all)
    return [file for file in beside if file.is_file()]
