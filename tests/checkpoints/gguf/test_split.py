"""Split GGUF files, as gguf-py writes them, against the whole file; and sets that are not sound."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from checkpoints.converted.convert import provenance
from checkpoints.fetch.hub_id import HubModel
from checkpoints.gguf.checkpoint import GGUFCheckpoint
from checkpoints.gguf.file import GGUFFile
from checkpoints.gguf.split import GGUFFiles
from checkpoints.load import load_parameters, open_checkpoint
from checkpoints.shard_name import MAX_SHARDS, ShardName, file_stem, parse_shard_name
from jaxinfer_entrypoints.loading.assembly import model_name
from tests.checkpoints.gguf import tiny_gguf
from tests.checkpoints.gguf.family_gguf import write_gguf
from tests.checkpoints.gguf.tiny_gguf import INT32, STRING, UINT8, UINT16, UINT32
from tests.checkpoints.test_load import abstract_parameters
from tests.data.random_llama import draw_weights
from tests.jaxinfer.models.random_checkpoint import RandomCheckpoint

Tensor = tuple[str, tuple[int, ...], int, bytes]
Q8_0 = gguf.GGMLQuantizationType.Q8_0
TENSORS = tiny_gguf.llama_tensors(draw_weights(tiny_gguf.CONFIG, seed=3), number=tiny_gguf.Q8_0)


def shard_path(folder: Path, number: int, count: int) -> Path:
    return folder / f"tiny-{number:05}-of-{count:05}.gguf"


def split_keys(number: int, count: int, num_tensors: int) -> dict[str, tuple[int, Any]]:
    return {
        "split.no": (UINT16, number - 1),
        "split.count": (UINT16, count),
        "split.tensors.count": (INT32, num_tensors),
    }


def write_shards(
    folder: Path,
    count: int,
    change: Callable[[int, dict[str, tuple[int, Any]], list[Tensor]], None] | None = None,
) -> Path:
    """A tiny Llama with its tokenizer, tensors dealt out in turn. Returns the first shard.

    ``change`` may alter the metadata and tensors of each, by its number from 1.
    """
    for number in range(1, count + 1):
        metadata = tiny_gguf.llama_metadata() if number == 1 else {}
        metadata |= split_keys(number, count, len(TENSORS))
        tensors = TENSORS[number - 1 :: count]
        if change:
            change(number, metadata, tensors)
        path = shard_path(folder, number, count)
        path.write_bytes(tiny_gguf.file_bytes(metadata, tensors))
    return shard_path(folder, 1, count)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", ["qwen2", "qwen3_moe", "gemma3"])
def test_a_split_file_is_the_whole_one(tmp_path: Path, case: str, count: int) -> None:
    whole_path = tmp_path / "whole.gguf"
    write_gguf(whole_path, case, Q8_0)
    num_tensors = len(GGUFFile(whole_path).tensors)
    write_gguf(tmp_path / "split.gguf", case, Q8_0, math.ceil(num_tensors / count))
    names = sorted(path.name for path in tmp_path.glob("split*"))
    if count > 1:  # gguf-py gives one alone its plain name
        assert names == [f"split-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]
    whole, split = GGUFCheckpoint(whole_path), open_checkpoint(tmp_path / names[0])
    assert isinstance(split, GGUFCheckpoint)
    assert split.model == whole.model
    for name in RandomCheckpoint(case).places:
        np.testing.assert_array_equal(split.tensor(name), whole.tensor(name), name, strict=True)


@pytest.mark.parametrize("count", [1, 2, 3, len(TENSORS)])
def test_parameters_and_tokenizer(tmp_path: Path, count: int) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(tiny_gguf.llama_bytes(tiny_gguf.Q8_0))
    whole, split = open_checkpoint(path), open_checkpoint(write_shards(tmp_path, count))
    assert (split.model, split.tokenizer) == (whole.model, whole.tokenizer)
    abstract = abstract_parameters(whole.model)
    expected, loaded = load_parameters(whole, abstract), load_parameters(split, abstract)
    assert loaded.keys() == expected.keys()
    for name, array in loaded.items():
        for one, other in zip(*map(_leaves, (array, expected[name])), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)


def _leaves(tree: Any) -> list[Any]:
    return (
        [leaf for key in tree for leaf in _leaves(tree[key])] if isinstance(tree, dict) else [tree]
    )


def test_tensors_are_read_in_place(tmp_path: Path) -> None:
    files = GGUFFiles(write_shards(tmp_path, 3))
    assert list(files.tensors) == [t[0] for first in range(3) for t in TENSORS[first::3]]
    for name, _, _, content in TENSORS:
        data = files.tensor_bytes(name)
        assert data.tobytes() == content
        assert not data.flags.owndata


def test_a_first_shard_without_tensors(tmp_path: Path) -> None:
    def all_in_the_second(number: int, _: Any, tensors: list[Tensor]) -> None:
        tensors[:] = TENSORS if number == 2 else []

    path = write_shards(tmp_path, 2, all_in_the_second)
    assert open_checkpoint(path).model.num_hidden_layers == 2


def refused(path: Path, named: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        open_checkpoint(path)
    assert str(error.value).startswith(f"{named}: ")
    assert "\n" not in str(error.value)


def test_another_shard_than_the_first(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    second = shard_path(tmp_path, 2, 3)
    refused(second, second, r"shard 2 of 3: give the first, tiny-00001-of-00003\.gguf$")


@pytest.mark.parametrize("number", [2, 3])
def test_a_missing_shard(tmp_path: Path, number: int) -> None:
    path, missing = write_shards(tmp_path, 3), shard_path(tmp_path, number, 3)
    missing.unlink()
    refused(path, missing, f"no such file: shard {number} of 3$")
    missing.mkdir()
    refused(path, missing, f"not a regular file: shard {number} of 3$")


@pytest.mark.parametrize(
    ("number", "changes", "named", "match"),
    [
        (2, {"split.no": (UINT16, 2)}, 2, "split.no is 2, but by its name it must be 1: renamed?"),
        (1, {"split.no": (UINT16, 1)}, 1, "split.no is 1, but by its name it must be 0: renamed?"),
        (2, {"split.count": (UINT16, 4)}, 2, r"split.count is 4, but 3 in tiny-00001-of-00003"),
        (1, {"split.count": (UINT16, 4)}, 1, r"must be NAME-00001-of-00004\.gguf"),
        (1, {"split.count": (UINT16, MAX_SHARDS + 1)}, 1, r"in \[0, 512\], got 513"),
        (1, {"split.count": (INT32, -1)}, 1, r"in \[0, 512\], got -1"),
        (1, {"split.count": (STRING, "3")}, 1, "must be of type int, got str"),
        (2, {"split.count": None}, 2, "'split.count' is missing"),
        (3, {"split.no": None}, 3, "'split.no' is missing"),
        # In all of them.
        (0, {"split.tensors.count": (INT32, 19)}, 1, "split.tensors.count is 19, but there are 20"),
        (0, {"split.tensors.count": (INT32, -1)}, 1, "split.tensors.count is -1, but there are 20"),
        (
            2,
            {"split.tensors.count": (INT32, 19)},
            2,
            "'split.tensors.count' is not what tiny-00001",
        ),
        (2, {"llama.block_count": (UINT32, 3)}, 2, "'llama.block_count' is not what tiny-00001"),
        (3, {"general.quantized_by": (STRING, "x")}, 3, "'general.quantized_by' is not what"),
    ],
)
def test_shards_that_contradict_each_other(
    tmp_path: Path, number: int, changes: dict[str, Any], named: int, match: str
) -> None:
    def change(this: int, metadata: dict[str, Any], _: Any) -> None:
        if number in (0, this):
            metadata.update(changes)
            for key in [key for key, value in changes.items() if value is None]:
                del metadata[key]

    path = write_shards(tmp_path, 3, change)
    refused(path, shard_path(tmp_path, named, 3), match)


def test_metadata_that_is_repeated(tmp_path: Path) -> None:
    """Some writers put all keys into every shard."""

    def repeat(_: int, metadata: dict[str, Any], __: Any) -> None:
        metadata |= tiny_gguf.llama_metadata() | {"test.number": (UINT8, 1)}

    assert open_checkpoint(write_shards(tmp_path, 2, repeat)).tokenizer.tokens


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    def repeat(number: int, _: Any, tensors: list[Tensor]) -> None:
        if number == 2:
            tensors.append(TENSORS[0])

    path = write_shards(tmp_path, 2, repeat)
    second = shard_path(tmp_path, 2, 2)
    name = re.escape(TENSORS[0][0])
    refused(path, second, f"tensor '{name}' is in tiny-00001-of-00002.gguf too")


def test_a_shard_under_another_name(tmp_path: Path) -> None:
    path = write_shards(tmp_path, 2).rename(tmp_path / "model.gguf")
    refused(path, path, r"split.count is 2, so its name must be NAME-00001-of-00002\.gguf$")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    path, second = write_shards(tmp_path, 2), shard_path(tmp_path, 2, 2)
    second.write_bytes(second.read_bytes()[:-100])
    refused(path, second, "cut off or damaged: expected at least")
    second.chmod(0)
    try:
        second.read_bytes()
    except PermissionError:  # not so for root
        refused(path, second, "cannot be read: Permission denied")


def test_a_folder_names_the_first_shard(tmp_path: Path) -> None:
    first = write_shards(tmp_path, 3)
    refused(tmp_path, tmp_path, rf"; give {re.escape(str(first))}$")
    first.unlink()
    refused(tmp_path, tmp_path, r"\(a converted one\) is in it$")


def test_names(tmp_path: Path) -> None:
    name = "a/b-00002-of-00003.gguf"
    shard = parse_shard_name(name)
    assert shard == ShardName("a/b", 2, 3)
    assert str(shard) == name
    for other in ("b.gguf", "b-2-of-3.gguf", "b-00000-of-00003.gguf", "b-00004-of-00003.gguf"):
        assert parse_shard_name(other) is None
        assert file_stem(Path(other)) == other.removesuffix(".gguf")
    assert HubModel("org/x", None, "q/b-00001-of-00003.gguf").name == "b"
    assert model_name(str(write_shards(tmp_path, 2))) == "tiny"


def test_a_conversion_counts_every_shard(tmp_path: Path) -> None:
    origin = provenance("tiny", write_shards(tmp_path, 3), np.dtype(np.float32))
    assert sorted(origin["files"]) == [shard_path(tmp_path, n, 3).name for n in (1, 2, 3)]
