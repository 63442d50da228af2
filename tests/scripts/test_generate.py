"""scripts/generate.py in this process, and once as a program from elsewhere."""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

from tests.scripts.conftest import SIZES, Run

ROOT = Path(__file__).parents[2]


def write_lines(path: Path, *lines: object) -> str:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


def test_json_lines_say_everything_in_input_order(run: Run, tmp_path: Path) -> None:
    inputs = write_lines(
        tmp_path / "in.jsonl",
        {"token_ids": list(range(12)) * 5},
        {"prompt": "abc"},
        "",
        {"messages": [{"role": "user", "content": "ab12"}]},
    )
    result = run("generate", "--input", inputs, "--json", "--max-tokens", "9", "--ignore-eos")
    assert result.error == ""
    assert [len(line["prompt_token_ids"]) for line in result.lines] == [60, 1, 3]
    for line in result.lines:
        assert set(line) == {
            "prompt_token_ids",
            "token_ids",
            "text",
            "finish_reason",
            "seed",
            "usage",
            "timings",
        }
        assert len(line["token_ids"]) == 9
        assert line["finish_reason"] == "length"
        assert line["usage"]["prompt_tokens"] == len(line["prompt_token_ids"])
        assert line["usage"]["completion_tokens"] == 9
        timings = line["timings"]
        assert 0 < timings["first_token_seconds"] <= timings["total_seconds"]


def test_a_prompt_alone_equals_the_same_in_a_batch(run: Run) -> None:
    prompts = ["abc", "12 a", "b"]
    flags = ["--json", "--max-tokens", "12", "--temperature", "1.5", "--seed", "4", "--ignore-eos"]
    together = [line["token_ids"] for line in run("generate", *flags, *prompts).lines]
    alone = [run("generate", *flags, prompt).lines[0]["token_ids"] for prompt in prompts]
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_random_seeds_are_told_and_repeat_a_run(run: Run) -> None:
    flags = ["--json", "--max-tokens", "16", "--temperature", "3", "--ignore-eos", "abc"]
    first, second = (run("generate", *flags).lines[0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = run("generate", "--seed", str(first["seed"]), *flags).lines[0]
    assert again["token_ids"] == first["token_ids"]


def test_one_prompt_streams_plain_text(run: Run) -> None:
    line = run("generate", "--json", "--max-tokens", "12", "--ignore-eos", "abc").lines[0]
    result = run("generate", "--max-tokens", "12", "--ignore-eos", "abc")
    assert result.stdout == line["text"] + "\n"
    assert "compile" in result.stderr
    assert run("generate", "--quiet", "--max-tokens", "2", "abc").stderr == ""


def test_chat_uses_the_template(run: Run, tmp_path: Path) -> None:
    messages = write_lines(tmp_path / "m", {"messages": [{"role": "user", "content": "ab"}]})
    by_flag = run("generate", "--json", "--chat", "--max-tokens", "2", "ab").lines[0]
    by_input = run("generate", "--json", "--input", messages, "--max-tokens", "2").lines[0]
    assert by_flag["prompt_token_ids"] == by_input["prompt_token_ids"]


def test_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", StringIO('{"prompt": "abc"}\n'))
    assert len(run("generate", "--input", "-", "--json", "--max-tokens", "3").lines) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 must be an object with exactly one of prompt, messages, token_ids"),
        ({"prompt": "a", "token_ids": [1]}, "line 2 must be an object with exactly one"),
        ({"text": "a"}, "line 2 must be an object with exactly one"),
        ({"prompt": 1}, "line 2: prompt must be a string"),
        ({"token_ids": [1, True]}, "line 2: token_ids must be a list of whole numbers"),
        ({"token_ids": "12"}, "line 2: token_ids must be a list"),
        ({"messages": [{"role": "user"}]}, "line 2: messages must be objects with role and"),
        ({"messages": []}, "line 2: number of messages must be in [1, 1024], got 0"),
        ({"token_ids": [1, 12]}, "input 2: prompt token ids must be in [0, 11], got 12"),
        ({"token_ids": []}, "input 2: the prompt has no tokens"),
        ({"token_ids": [1] * 128}, "input 2: prompt (128 tokens) plus max_tokens (1) is 129"),
        ({"messages": [{"role": "king", "content": "a"}]}, "king"),
    ],
)
def test_bad_lines_are_named(run: Run, tmp_path: Path, line: object, message: str) -> None:
    inputs = write_lines(tmp_path / "in.jsonl", {"prompt": "abc"}, line)
    result = run("generate", "--input", inputs, "--json", "--quiet")
    assert message in result.error
    assert result.error.startswith("error: ")
    assert "\n" not in result.error
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json"],
        ["--input", "x.jsonl", "abc"],
        ["--max-tokens", "0", "abc"],
        ["--cpu", "--gpu", "abc"],
        ["--kv-memory", "lots", "abc"],
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    assert run("generate", *arguments).error == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "nan"], "temperature must be in [0.0, 100.0], got nan"),
        (["--temperature", "-1"], "temperature must be in [0.0, 100.0], got -1.0"),
        (["--top-p", "0"], "top_p must be in (0.0, 1.0], got 0.0"),
        (["--top-k", "-1"], "top_k must be in [0, 1048576], got -1"),
        (["--seed", "-1"], "seed must be in"),
        (["--max-tokens", "4096"], "more than max_model_len (128)"),
    ],
)
def test_sampling_limits(run: Run, arguments: list[str], message: str) -> None:
    assert message in run("generate", "--quiet", "abc", *arguments).error


def test_missing_input_file(run: Run, tmp_path: Path) -> None:
    result = run("generate", "--input", str(tmp_path / "none.jsonl"))
    assert "none.jsonl" in result.error
    assert result.error.startswith("error: ")


def test_runs_as_a_program_from_anywhere(model_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--quiet", *SIZES]
    command += ["--model", str(model_path), "--max-tokens", "4", "--json", "abc"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert len(json.loads(done.stdout)["token_ids"]) <= 4
    assert done.stderr == ""
