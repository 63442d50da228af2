"""scripts/evaluate.py against losses of the same windows by hand."""

import math
from pathlib import Path

import pytest

from tests.jaxinfer_entrypoints.conftest import Run

TEXT = "abc 12 ab a1 2b c" * 20


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_windows_do_not_overlap(run: Run, text_path: Path) -> None:
    whole = run("evaluate", "--text", str(text_path), "--json").lines[0]
    assert whole["tokens"] > 128
    assert whole["window"] == 127
    assert whole["predicted_tokens"] == whole["tokens"] - math.ceil(whole["tokens"] / 127)
    assert whole["perplexity"] == pytest.approx(math.exp(whole["nll"]))
    first = run("evaluate", "--text", str(text_path), "--json", "--max-tokens", "127").lines[0]
    assert (first["tokens"], first["predicted_tokens"]) == (127, 126)
    # A window of 64 forgets what stood before: the losses differ, the counts too.
    short = ["--max-tokens", "127", "--max-model-len", "64"]
    halves = run("evaluate", "--text", str(text_path), "--json", *short).lines[0]
    assert halves["predicted_tokens"] == 124
    assert halves["nll"] != first["nll"]


@pytest.mark.thorough("benchmarks")
@pytest.mark.usefixtures("frees_memory")
def test_formats_beside_each_other(run: Run, text_path: Path) -> None:
    """The plain row's losses are those of the engine; a format is off by little, and smaller."""
    flags = ("--text", str(text_path), "--json", "--max-tokens", "150")
    alone = run("evaluate", *flags).lines[0]
    formats = ("int8", "int8-dynamic", "kv-int8")
    result = run("evaluate", *flags, "--formats", *formats)
    assert result.error == ""
    plain, int8, dynamic, pages = result.lines[0]["formats"]
    names = [row["weights"] for row in (plain, int8, dynamic, pages)]
    assert names == ["float32", *formats]
    assert plain["nll"] == pytest.approx(alone["nll"], rel=1e-6)
    assert (plain["mean_kl"], plain["top1_agreement"], plain["of_plain"]) == (0, 1, 1)
    quantized = run("evaluate", *flags, "--quantize", "int8").lines[0]
    assert int8["nll"] == pytest.approx(quantized["nll"], rel=1e-6)
    assert int8["nll"] == pytest.approx(plain["nll"], rel=0.01)
    assert 0 < int8["mean_kl"] < dynamic["mean_kl"] < 0.01
    assert int8["of_plain"] == dynamic["of_plain"] < 0.35
    assert all(row["decode_tokens_per_second_8"] > 0 for row in (plain, int8, dynamic))
    assert pages["of_plain"] == 1
    assert 0 < pages["mean_kl"] < 0.01
    kept = run("evaluate", *flags, "--formats", "checkpoint").error
    assert kept.startswith("error: tiny holds no matrices of integers: --quantize checkpoint is")
    table = run("evaluate", *flags[:2], "--max-tokens", "20", "--formats", "int8").stdout
    assert [line.split()[0] for line in table.splitlines()] == ["weights", "float32", "int8"]
    assert run("evaluate", *flags, "--formats", "int8", "--quantize", "int8").error == "2"


@pytest.mark.usefixtures("frees_memory")
def test_plain_output(run: Run, text_path: Path) -> None:
    result = run("evaluate", "--text", str(text_path), "--max-tokens", "20")
    assert "perplexity" in result.stdout
    assert "load" in result.stderr


@pytest.mark.usefixtures("frees_memory")
def test_bad_texts(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"abc\xff")
    assert "bad.txt is not UTF-8" in run("evaluate", "--text", str(path), "--json").error
    path.write_text("a")
    assert "1 tokens; at least 2" in run("evaluate", "--text", str(path), "--json").error
    missing = run("evaluate", "--text", str(tmp_path / "none"), "--json").error
    assert missing.startswith("error: ")
    assert run("evaluate", "--text", str(path), "--max-tokens", "1").error == "2"
