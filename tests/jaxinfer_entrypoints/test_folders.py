"""Hugging Face folders as --model: from files to the tokens that transformers chose."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints.hugging_face.family_folder import write_folder, write_tokenizer
from tests.data.random_family import draw_prompt
from tests.jaxinfer.models.random_checkpoint import CASES
from tests.jaxinfer_entrypoints.conftest import Result, Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a.model-1.5"
    write_folder(folder, "gemma3", num_files=3)
    write_tokenizer(folder, CASES["gemma3"]["config"]["vocab_size"])
    return folder


def test_the_tokens_of_transformers(run: Run, folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"token_ids": draw_prompt("gemma3")}))
    arguments = ["--input", str(prompts), "--json", "--max-tokens", "32", "--ignore-eos"]
    result = run("generate", *arguments, model=str(folder))
    assert not result.error, result.error
    (line,) = result.lines
    assert line["token_ids"] == CASES["gemma3"]["greedy_ids"][:32]


def test_its_generation_config_is_the_default(run: Run, folder: Path) -> None:
    fields = {"do_sample": True, "temperature": 2.0, "top_k": 50, "eos_token_id": 95}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    arguments = ["--json", "--max-tokens", "8", "--seed", "1", "ab c"]
    result = run("generate", *arguments, model=str(folder))
    assert "where no flag says else: temperature 2, top_k 50" in result.stderr
    said = run("generate", *arguments, "--temperature", "2", "--top-k", "50", model=str(folder))
    plain = run("generate", *arguments, "--no-generation-config", model=str(folder))
    greedy = run("generate", *arguments, "--temperature", "0", model=str(folder))

    def tokens(result: Result) -> list[int]:
        return result.lines[0]["token_ids"]

    assert tokens(result) == tokens(said) != tokens(greedy) == tokens(plain)
    assert "generation_config" not in plain.stderr


@pytest.mark.thorough("more settings of folders")
def test_rows_without_a_token_are_never_chosen(run: Run, tmp_path: Path) -> None:
    """The embedding has 97 rows; the last one is written where a token has it."""
    write_folder(tmp_path, "qwen3")
    arguments = ["--json", "--max-tokens", "100", "--ignore-eos", "--seed", "1", "--n", "4", "ab"]
    for num_tokens in (96, 97):
        write_tokenizer(tmp_path, num_tokens)
        suppressed = [3, *range(num_tokens, 97)]  # rows that no request could name, too
        fields = {"suppress_tokens": suppressed}
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
        result = run("generate", *arguments, "--temperature", "5", model=str(tmp_path))
        assert not result.error, result.error
        choices = result.lines[0]["choices"]
        assert max(token_id for one in choices for token_id in one["token_ids"]) == num_tokens - 1
    biased = run("generate", *arguments, "--logit-bias", "96=100", model=str(tmp_path))
    assert {96} == {*biased.lines[0]["choices"][0]["token_ids"]}


@pytest.mark.thorough("more settings of folders")
def test_what_else_a_generation_config_asks_for(run: Run, folder: Path) -> None:
    """Tokens that never come, the least number of them; the rest is named in a line."""
    arguments = ["--json", "--max-tokens", "8", "--ignore-eos", "ab c"]
    plain = run("generate", *arguments, model=str(folder)).lines[0]["token_ids"]
    fields = {"suppress_tokens": [plain[0]], "min_new_tokens": 99, "num_beams": 4, "min_length": 0}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    result = run("generate", *arguments, model=str(folder))
    assert plain[0] not in result.lines[0]["token_ids"]
    assert "says else: logit_bias of 1 tokens, min_tokens 99" in result.stderr
    path = folder / "generation_config.json"
    assert result.stderr.count(f"{path}: not in effect: num_beams 4\n") == 1
    biased = ["--logit-bias", f"{plain[0]}=0", *arguments]
    assert run("generate", *biased, model=str(folder)).lines[0]["token_ids"] == plain
    off = run("generate", "--no-generation-config", *arguments, model=str(folder))
    assert off.lines[0]["token_ids"] == plain


@pytest.mark.thorough("more settings of folders")
def test_stop_strings_of_a_generation_config(run: Run, folder: Path, convert: "Convert") -> None:
    arguments = ["--json", "--max-tokens", "12", "--ignore-eos", "ab c"]
    text = run("generate", *arguments, model=str(folder)).lines[0]["text"]
    stop = text[1:3]
    assert len(stop) == 2
    fields = {"stop_strings": [stop]}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    converted = folder.parent / "converted"
    convert(str(folder), str(converted), "--quiet")
    for model in (folder, converted):
        line = run("generate", *arguments, model=str(model)).lines[0]
        assert (line["text"], line["stop_string"]) == (text.split(stop)[0], stop)
    other = run("generate", "--stop", "no such text", *arguments, model=str(folder)).lines[0]
    assert other["text"] == text


@pytest.mark.thorough("more settings of folders")
def test_short_texts_of_a_longrope_are_those_of_transformers(run: Run, tmp_path: Path) -> None:
    """The original context is served unless more is asked for, which takes the long factors."""
    folder, prompts = tmp_path / "phi", tmp_path / "prompts.jsonl"
    write_folder(folder, "phi3_short")
    write_tokenizer(folder, 97)
    prompts.write_text(json.dumps({"token_ids": draw_prompt("phi3_short")}))
    arguments = ["--input", str(prompts), "--json", "--max-tokens", "32", "--ignore-eos"]
    result = run("generate", *arguments, model=str(folder))
    expected = CASES["phi3_short"]["greedy_ids"][:32]
    assert result.lines[0]["token_ids"] == expected
    assert result.stderr.count("the short factors of the model's rope count, for up to 128") == 1
    longer = run("generate", *arguments, "--max-model-len", "129", model=str(folder))
    assert longer.lines[0]["token_ids"] != expected
    assert "--max-model-len 129 is more than 128: the long factors" in longer.stderr


@pytest.mark.thorough("more settings of folders")
def test_yarn_is_switched_on_as_cards_say(run: Run, tmp_path: Path) -> None:
    """Beyond the trained context, up to its stretched length."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    changes = {"max_position_embeddings": 64, "rope_scaling": rope}
    write_folder(tmp_path, "qwen3", changes=changes)
    write_tokenizer(tmp_path, 97)
    arguments = ["--json", "--max-tokens", "100", "--ignore-eos", "ab c"]
    result = run("generate", *arguments, "--max-model-len", "256", model=str(tmp_path))
    assert not result.error, result.error
    assert len(result.lines[0]["token_ids"]) == 100
    too_long = run("generate", *arguments, "--max-model-len", "257", model=str(tmp_path))
    assert "257 is more than the model's context (256)" in too_long.error


def test_what_is_left_out_is_said_once(run: Run, folder: Path) -> None:
    images = {"model.vision_tower.a": np.ones(3, np.float32)}
    (folder / "model.safetensors.index.json").unlink()
    write_folder(folder, "gemma3", extra=images)
    result = run("generate", "--max-tokens", "1", "ab c", model=str(folder))
    assert result.stderr.count("1 tensors for images are left out") == 1
    quiet = run("generate", "--quiet", "--max-tokens", "1", "ab c", model=str(folder))
    assert "images" not in quiet.stderr


def test_what_is_wrong_is_said_in_one_line(run: Run, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    error = run("generate", "x", model=str(folder)).error
    assert error == f"error: {folder / 'tokenizer.json'}: no such file"
    (folder / "config.json").unlink()
    error = run("generate", "x", model=str(folder)).error
    assert error.startswith(f"error: {folder}: neither config.json (a Hugging Face folder) nor")


Convert = Callable[..., str]


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Returns what convert.py prints, or the line it ends with."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["convert", *arguments])
        try:
            importlib.import_module("jaxinfer_entrypoints.convert").main()
        except SystemExit as exit_:
            return str(exit_.code)
        return capsys.readouterr().out

    return call


@pytest.mark.thorough("calibration by its flags")
def test_a_folder_is_calibrated(run: Run, folder: Path, tmp_path: Path, convert: Convert) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ab c " * 400)
    flags = ["--quantize", "int4", "--calibrate", "gptq", "--calibration-text", str(text)]
    said = convert(str(folder), str(tmp_path / "gptq"), "--quiet", *flags)
    assert said.endswith(f" MiB in int4; use it with --model {tmp_path / 'gptq'}\n")
    description = json.loads((tmp_path / "gptq" / "jaxinfer.json").read_text())
    assert description["provenance"]["calibration"]["method"] == "gptq"
    assert description["provenance"]["calibration"]["tokens"] > 512
    plain = convert(str(folder), str(tmp_path / "plain"), "--quiet", "--quantize", "int4")
    assert "in int4" in plain
    arguments = ["--json", "--max-tokens", "16", "--ignore-eos", "ab c"]
    for name in ("gptq", "plain"):
        result = run("generate", *arguments, model=str(tmp_path / name))
        assert len(result.lines[0]["token_ids"]) == 16


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--calibrate", "gptq"], "--calibrate and --calibration-text are given together"),
        (["--calibration-text", "x"], "--calibrate and --calibration-text are given together"),
        (
            ["--calibrate", "awq", "--calibration-text", "x"],
            "--calibrate is for --quantize int4, int4-64, int4-128, int4-symmetric, "
            "int4-symmetric-64, int4-symmetric-128, not none",
        ),
        (
            [
                "--calibrate",
                "awq",
                "--calibration-text",
                "x",
                "--quantize",
                "int4",
                "--calibration-tokens",
                "5",
            ],
            "--calibration-tokens must be at least 512, got 5",
        ),
        (
            ["--calibrate", "awq", "--calibration-text", "/no/file", "--quantize", "int4"],
            "[Errno 2] No such file or directory: '/no/file'",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_said_before_anything_is_done(
    flags: list[str], error: str, tmp_path: Path, convert: Convert
) -> None:
    assert convert("no-such-model", str(tmp_path / "out"), *flags) == f"error: {error}"


def test_a_converted_folder_gives_the_same_tokens(
    run: Run, folder: Path, tmp_path: Path, convert: Convert
) -> None:
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    out = tmp_path / "converted"
    said = convert(str(folder), str(out), "--quiet")
    assert said.endswith(f" MiB in float32; use it with --model {out}\n")
    arguments = ["--json", "--max-tokens", "16", "--ignore-eos", "ab c"]
    first, second = (run("generate", *arguments, model=str(m)) for m in (folder, out))
    assert first.lines[0]["token_ids"] == second.lines[0]["token_ids"]
    assert first.lines[0]["text"] == second.lines[0]["text"]
    assert "repetition_penalty 1.5" in second.stderr
    assert (
        convert(str(folder), str(out)) == f"error: {out} exists: give another folder, or remove it"
    )
    again = convert(str(out), str(tmp_path / "b"))
    assert again == f"error: {out} has been converted already"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([folder.name, out.name])
