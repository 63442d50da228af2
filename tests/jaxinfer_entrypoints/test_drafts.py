"""--draft: who drafts, what is refused, and that nothing else changes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from checkpoints.load import Checkpoint
from checkpoints.vocabulary import check_vocabulary, unused_tokens
from tests.checkpoints.gguf.tiny_gguf import (
    CONFIG,
    UINT32,
    file_bytes,
    llama_metadata,
    llama_tensors,
)
from tests.checkpoints.hugging_face.family_folder import write_folder, write_tokenizer
from tests.data.random_llama import draw_weights
from tests.jaxinfer.models.random_checkpoint import CASES
from tests.jaxinfer_entrypoints.conftest import Run

TEXT = ("--json", "--max-tokens", "40", "--ignore-eos", "abc12ab1")


def checkpoint(*tokens: str, num_rows: int = 9) -> Checkpoint:
    model, tokenizer = SimpleNamespace(vocab_size=num_rows), SimpleNamespace(tokens=tokens)
    return cast(Checkpoint, SimpleNamespace(model=model, tokenizer=tokenizer))


def test_vocabularies_must_be_the_same() -> None:
    target = checkpoint("a", "b", "c")
    check_vocabulary(target, checkpoint("a", "b", "c"), "x")
    # What only fills one of them up is no token.
    check_vocabulary(target, checkpoint("a", "b", "c", "", "[PAD4]"), "x")
    # Nor is what has no embedding.
    check_vocabulary(target, checkpoint("a", "b", "c", "<image>", num_rows=3), "x")
    for other in (("a", "b"), ("a", "b", "d"), ("a", "b", "c", "d"), ("a", "", "c")):
        with pytest.raises(ValueError, match="--draft x has another vocabulary"):
            check_vocabulary(target, checkpoint(*other), "x")
    with pytest.raises(ValueError, match="token 2 is 'd' there and 'c' here"):
        check_vocabulary(target, checkpoint("a", "b", "d"), "x")


def test_rows_without_a_token() -> None:
    """Holes, names of converters that are the id's own, and all behind the last token."""
    tokens = ("a", "", "[PAD2]", "[PAD2]", "b", "[PAD5]")
    assert unused_tokens(tokens, 9) == ((1, 3), (5, 9))
    assert unused_tokens(tokens, 2) == ((1, 2),)
    assert unused_tokens(tokens[:1], 1) == ()


def tokens(run: Run, *flags: str) -> tuple[list[int], dict[str, Any]]:
    result = run("generate", *flags, *TEXT)
    assert not result.error, result.error
    (line,) = result.lines
    return line["token_ids"], line["usage"]


@pytest.mark.thorough("drafters by their flags")
def test_who_drafts_changes_no_token(run: Run, model_path: Path) -> None:
    plain, usage = tokens(run)
    assert usage["drafted_tokens"] == 0
    # The model itself, which is always right; held in 8 bits, seldom wrong; one of its two layers.
    for who in (
        [str(model_path)],
        [str(model_path), "--draft-quantize", "int8"],
        ["layers:1", "--verify", "rejection"],  # greedy tokens are the same
    ):
        found, usage = tokens(run, "--draft", *who, "--num-drafts", "3")
        assert found == plain
        assert usage["drafted_tokens"] > 0
        if who == [str(model_path)]:
            assert usage["accepted_tokens"] == usage["drafted_tokens"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft", "layers:0"], "layers:N needs a number of layers from 1 on, got 'layers:0'"),
        (["--draft", "layers:x"], "layers:N needs a number of layers from 1 on, got 'layers:x'"),
        (["--draft", "layers:2"], "a model of 2 layers can draft with its first 1 at most, got 2"),
        (["--draft", "ngram", "--draft-quantize", "int8"], "--draft-quantize needs a draft model"),
        (["--draft-quantize", "int8"], "--draft-quantize needs a draft model: --draft MODEL"),
        (["--draft", "ngrams"], "ngrams"),
        (["--draft", "/nowhere.gguf"], "/nowhere.gguf"),
        (["--draft", ""], "--draft names nobody"),
        (["--draft", "ngram", "--num-drafts", "0"], "num_drafts must be between 1 and 31, got 0"),
    ],
)
def test_what_is_refused(run: Run, flags: list[str], message: str) -> None:
    error = run("generate", *flags, *TEXT).error
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error


def test_a_draft_of_another_vocabulary(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    write_folder(folder, "gemma3")
    write_tokenizer(folder, CASES["gemma3"]["config"]["vocab_size"])
    error = run("generate", "--draft", str(folder), *TEXT).error
    assert "has another vocabulary than the model: token 0 is" in error


@pytest.mark.thorough("drafters by their flags")
def test_a_draft_of_other_sizes(run: Run, tmp_path: Path) -> None:
    """Fewer layers, other heads: its pages are its own."""
    path = tmp_path / "small.gguf"
    metadata = llama_metadata() | {"llama.block_count": (UINT32, 1)}
    weights = draw_weights(CONFIG | {"num_hidden_layers": 1}, seed=9)
    path.write_bytes(file_bytes(metadata, llama_tensors(weights)))
    plain, _ = tokens(run)
    found, usage = tokens(run, "--draft", str(path))
    assert found == plain
    assert usage["drafted_tokens"] > 0


@pytest.mark.thorough("benchmarks")
def test_bench_with_a_draft_model(run: Run, model_path: Path) -> None:
    """Greedy and seeded, by both rules; the same weights draft, so nearly all is right."""
    sizes = ["--output-len", "12", "--num-drafts", "2", "--temperature", "0.8", "--json"]
    (figures,) = run("bench", "speculation", "--draft", str(model_path), *sizes).lines
    assert [row["verify"] for row in figures["rows"]] == ["exact"] * 4 + ["rejection"] * 4
    for row in figures["rows"]:
        assert row["tokens_equal"] is (True if row["verify"] == "exact" else None)
        assert row["acceptance_rate"] > 0.9
    assert figures["pays_up_to"].keys() == {row["text"] for row in figures["rows"]}


@pytest.mark.thorough("benchmarks")
def test_a_step_in_parts_gives_the_same_tokens(run: Run, model_path: Path) -> None:
    sizes = ["--output-len", "12", "--rounds", "1", "--num-drafts", "2", "--json"]
    for who in ("ngram", "layers:1", str(model_path)):
        (figures,) = run("bench", "programs", "--draft", who, *sizes).lines
        assert figures["tokens_equal"]
        assert figures["acceptance_rate"] > 0
        assert len(figures["ms_per_token"]) == 4
