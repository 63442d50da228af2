"""Block sizes by device and shape, and the program that writes them."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxinfer_entrypoints import tune
from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import tpu


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tuned sizes in place of the package's."""
    (tmp_path / tuning.FOLDER).mkdir()
    monkeypatch.setattr(tuning, "files", lambda _: tmp_path)
    tuning._read.cache_clear()
    yield tmp_path / tuning.FOLDER
    tuning._read.cache_clear()


def pages(device_kind: str, num_kv_heads: int = 8, page_size: int = 128) -> Any:
    return tpu.abstract_kv_pages(4, page_size, num_kv_heads, 128, jnp.bfloat16, device_kind)


def test_tuned_sizes_are_taken_for_their_shape_and_device(tuned: Path) -> None:
    path = tuned / tuning.file_name("TPU v5 lite")
    assert path.name == "tpu_v5_lite.json"
    bucket = tpu.bucket_name(8, 4, 128, 128)
    sizes = {"decode": 1024, "verify": 256, "chunk": 256}
    tuning.write_sizes(path, "ragged_paged_attention", "bfloat16", bucket, {"decode": 128})
    tuning.write_sizes(path, "ragged_paged_attention", "bfloat16", bucket, sizes)
    default = dict.fromkeys(sizes, tpu.KV_BLOCK_TOKENS)
    assert tpu.block_sizes(pages("TPU v5 lite"), 4, 8) == sizes
    assert tpu.block_sizes(pages("TPU v5 lite"), 3, 8) == default
    assert tpu.block_sizes(pages("TPU v6 lite"), 4, 8) == default
    assert tpu.block_sizes(pages(""), 4, 8) == default
    assert [entry.name for entry in tuned.iterdir()] == [path.name]


def test_default_blocks_fit_vector_memory() -> None:
    for num_kv_heads, expected in ((8, 512), (64, 256), (128, 128)):
        sizes = tpu.block_sizes(pages("", num_kv_heads), 1, num_kv_heads)
        assert set(sizes.values()) == {expected}
        token_bytes = 2 * num_kv_heads * 128 * 2
        assert 2 * expected * token_bytes <= tpu.MAX_BLOCKS_BYTES
    with pytest.raises(NotImplementedError, match="two pages of 1024 tokens take"):
        tpu.block_sizes(pages("", 32, page_size=1024), 1, 32)


def test_shipped_sizes_are_powers_of_two() -> None:
    folder = Path(tuning.__file__).parent / tuning.FOLDER
    for path in folder.glob("*.json"):
        for dtypes in json.loads(path.read_text()).values():
            for buckets in dtypes.values():
                for sizes in buckets.values():
                    assert all(size & (size - 1) == 0 for size in sizes.values()), path


def test_every_candidate_is_run_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: what is measured is a number of its own here, not a time."""
    options = argparse.Namespace(
        kv_heads=1,
        query_heads=1,
        head_dim=64,
        page_size=128,
        kv_dtype="float32",
        num_seqs=2,
        kv_tokens=512,
    )
    calls = []

    def count(call: Any) -> float:
        calls.append(call())
        return float(len(calls))

    monkeypatch.setattr(tune, "CANDIDATES", (64, 128, 512))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        times = dict(tune.measure(options, "verify", "", count))
    assert times == {128: 1.0, 512: 2.0}  # 64 is less than a page
    assert all(jnp.isfinite(outputs).all() for outputs in calls)
    _, _, _, batch = tune.inputs(options, "chunk", "")
    assert batch.chunks.starts.tolist() == [0, 128, 256, 384] * 4
    assert batch.decodes.num_rows == 0


def test_only_a_tpu_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tune.py", "--cpu"])
    with pytest.raises(ValueError, match="measured on a TPU, this is cpu"):
        tune.tune()
    monkeypatch.setattr("sys.argv", ["tune.py", "--cpu", "--query-heads", "30"])
    with pytest.raises(ValueError, match="--query-heads 30 is no multiple of --kv-heads 8"):
        tune.tune()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"ragged_paged_attention": 3}',
        '{"ragged_paged_attention": {"bfloat16": {"x": {"decode": "128"}}}}',
        '{"ragged_paged_attention": {"bfloat16": {"x": {"decode": -128}}}}',
        '{"a":' * 5000,
    ],
)
def test_a_damaged_file_is_named(text: str, tuned: Path) -> None:
    path = tuned / tuning.file_name("TPU v5 lite")
    path.write_text(text)
    message = re.escape(f"{path} is no file of block sizes, delete it")
    with pytest.raises(ValueError, match=message):
        tpu.block_sizes(pages("TPU v5 lite"), 4, 8)
    with pytest.raises(ValueError, match=message):
        tuning.write_sizes(path, "ragged_paged_attention", "bfloat16", "x", {"decode": 128})
    assert path.read_text() == text
