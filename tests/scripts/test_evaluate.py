"""scripts/evaluate.py against losses of the same windows by hand."""

import math
from pathlib import Path

import pytest

from tests.scripts.conftest import Run

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


def test_plain_output(run: Run, text_path: Path) -> None:
    result = run("evaluate", "--text", str(text_path), "--max-tokens", "20")
    assert "perplexity" in result.stdout
    assert "load" in result.stderr


def test_bad_texts(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"abc\xff")
    assert "bad.txt is not UTF-8" in run("evaluate", "--text", str(path), "--json").error
    path.write_text("a")
    assert "1 tokens; at least 2" in run("evaluate", "--text", str(path), "--json").error
    missing = run("evaluate", "--text", str(tmp_path / "none"), "--json").error
    assert missing.startswith("error: ")
    assert run("evaluate", "--text", str(path), "--max-tokens", "1").error == "2"
