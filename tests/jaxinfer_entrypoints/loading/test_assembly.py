"""From options to an engine: what is refused, and how."""

import argparse
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxinfer.config import DtypePolicy, EngineConfig
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.sharding import make_mesh
from jaxinfer_entrypoints.command_line.engine import parse_bytes
from jaxinfer_entrypoints.loading import sizes as engine_sizes
from tests.checkpoints.gguf.tiny_gguf import STRING, llama_bytes
from tests.jaxinfer.tiny import tiny_model
from tests.jaxinfer_entrypoints.conftest import Run

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("2GB", 2 * 10**9),
        ("4k", 4000),
        ("1000", 1000),
    ],
)
def test_sizes_in_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "0", "1XB", "nan", "9999999TiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-num-seqs", "0"], "max_num_seqs must be between 1 and 1024, got 0"),
        (["--max-num-seqs", "1025"], "max_num_seqs must be between 1 and 1024, got 1025"),
        (["--max-num-batched-tokens", "63"], "max_num_batched_tokens must be between 64"),
        (["--max-num-batched-tokens", "100"], "max_num_batched_tokens must be a multiple of 64"),
        (["--priority-seconds", "nan"], "priority_seconds must be between 0"),
        (["--max-model-len", "0"], "max_model_len must be between 2 and 1048576, got 0"),
        (["--max-model-len", "129"], "more than the model's context (128)"),
        (["--page-size", "0"], "page_size must be"),
        (["--page-size", "24"], "page_size must be a power of two"),
        (["--kv-memory", "10KiB"], "raise --kv-memory or lower --max-model-len"),
    ],
)
def test_sizes_of_the_engine(run: Run, arguments: list[str], message: str) -> None:
    result = run("evaluate", "--text", __file__, "--json", *arguments)
    assert message in result.error, result.error
    assert result.error.startswith("error: ")


def test_models_that_are_not_there(run: Run, tmp_path: Path) -> None:
    unknown = run("generate", "--quiet", "abc", model="smollm3").error
    assert "'smollm3' is neither a file or folder nor a known name" in unknown
    assert "smollm2-135m-instruct" in unknown
    for content in (b"", b"GGUF", b"PK\x03\x04 something else"):
        path = tmp_path / "broken.gguf"
        path.write_bytes(content)
        assert "broken.gguf" in run("generate", "--quiet", "abc", model=str(path)).error
    assert run("generate", "--quiet", "abc", model=str(tmp_path)).error.startswith("error: ")


def test_a_tokenizer_that_cannot_be_built_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(llama_bytes(tokenizer__ggml__pre=(STRING, "unknown")))
    error = run("generate", "--quiet", "abc", model=str(path)).error
    assert f"{path}: pre-tokenizer 'unknown' is not supported" in error


@pytest.mark.parametrize("platform", [["--gpu"], ["--tpu", "v5e"]])
def test_a_missing_accelerator_is_one_line(platform: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *platform, "abc"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {' '.join(platform)}: no ")
    assert "found 1 x cpu" in line
    assert "use --cpu" in line


def test_more_kv_memory_than_there_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is loaded; replicas on a CPU share its memory."""
    monkeypatch.setattr("jaxinfer_entrypoints.loading.sizes.free_bytes", lambda device: 3 << 20)
    error = run("generate", "a", "--kv-memory", "4MiB", "--quiet").error
    assert "--kv-memory asks for 4 MiB, of which 3 MiB are free" in error


def test_replicas_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mesh = tiny_model(), make_mesh(jax.devices("cpu")[:1])
    dtypes = DtypePolicy.for_platform("cpu")
    monkeypatch.setattr(engine_sizes, "free_bytes", lambda device: 100 << 20)
    spec = EngineSpec(model, EngineConfig(), dtypes, mesh)
    alone = engine_sizes.default_kv_bytes(spec, 1)
    four = engine_sizes.default_kv_bytes(spec, 4)
    assert 4 * four <= alone <= 50 << 20


@pytest.mark.thorough("layouts of weights")
def test_weights_laid_out_as_on_a_tpu_are_the_same_model(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("generate", "--quiet", "--json", "--max-tokens", "8", "--ignore-eos", "abc")
    expected = run(*flags)
    monkeypatch.setattr("jaxinfer.sharding.TILED_PLATFORMS", ("cpu",))
    found = run(*flags)
    assert (found.error, expected.error) == ("", "")
    assert found.lines[0]["text"] == expected.lines[0]["text"]
