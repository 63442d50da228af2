"""scripts/generate.py in this process, and once as a program from elsewhere."""

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jaxinfer.batch import batch_shapes
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.request import Ending, Request, SamplingParams
from jaxinfer_entrypoints.generate import shapes_for
from jaxinfer_entrypoints.generation import Generations
from jaxinfer_entrypoints.loading.assembly import PickShapes
from serving.text.tokenizer import Tokenizer
from tests.jaxinfer_entrypoints.conftest import SIZES, Run
from tests.patience import HANG_SECONDS
from tests.serving.fakes import FakeEngine, expected_text, expected_token_ids, served_model

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


def test_an_answer_is_not_lost_because_a_later_step_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends the second of three prompts, two at a time, before the first."""
    step, ended = Generations.step, list[str]()

    def fail_behind_an_end(self: Generations) -> Any:
        if ended:
            raise ValueError("the device is gone")
        news = step(self)
        for generation, _ in news:
            if generation.request.request_id == "0":
                generation.running.add(0)
            elif generation.is_finished:
                ended.append(generation.request.request_id)
        return news

    flags = ["--json", "--max-tokens", "5", "--ignore-eos"]
    prompts = ["abc", "12", "b"]
    whole = run("generate", *flags, *prompts).lines
    monkeypatch.setattr(Generations, "step", fail_behind_an_end)
    result = run("generate", *flags, *prompts)
    (line,) = result.lines
    assert line["token_ids"] == whole[1]["token_ids"]
    assert result.error == "error: the device is gone"
    assert result.stderr.endswith("not answered: prompt 1, prompt 3\n")


def test_a_prompt_alone_equals_the_same_in_a_batch(run: Run) -> None:
    prompts = ["abc", "12 a", "b"]
    flags = ["--json", "--max-tokens", "12", "--temperature", "1.5", "--seed", "4", "--ignore-eos"]
    together = [line["token_ids"] for line in run("generate", *flags, *prompts).lines]
    alone = [run("generate", *flags, prompt).lines[0]["token_ids"] for prompt in prompts]
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


@pytest.mark.thorough("more cases of the kernels")
def test_another_attention_gives_the_same_tokens(run: Run) -> None:
    flags = ["--json", "--max-tokens", "12", "--ignore-eos", "--seed", "4", "--temperature", "1"]
    plain = run("generate", *flags, "abc").lines[0]
    for name in ("xla", "reference"):
        other = run("generate", *flags, "--attention", name, "abc").lines[0]
        assert other["token_ids"] == plain["token_ids"]
    error = run("generate", *flags, "--attention", "tpu", "abc").error
    assert error == "error: --attention tpu runs on TPU only, this is cpu"


def test_drafts_change_no_token(run: Run) -> None:
    arguments = ["--json", "--max-tokens", "30", "--ignore-eos", "ab ab ab ab ab"]
    (plain,) = run("generate", *arguments).lines
    (drafted,) = run("generate", "--draft", "ngram", "--num-drafts", "3", *arguments).lines
    assert drafted["token_ids"] == plain["token_ids"]
    error = run("generate", "--draft", "ngram", "--num-drafts", "32", "ab").error
    assert error == "error: num_drafts must be between 1 and 31, got 32"


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
        ({"token_ids": [1, 12]}, "line 2: prompt token ids must be in [0, 11], got 12"),
        ({"token_ids": []}, "line 2: token_ids is empty; at least 1 is needed"),
        ({"token_ids": [1] * 128}, "line 2: prompt (128 tokens) plus max_tokens (1) is 129"),
        ({"messages": [{"role": "king", "content": "a"}]}, "king"),
        ('{"prompt": "a\\ud83d"}', "line 2: prompt has half a character, the surrogate '\\ud83d'"),
    ],
)
def test_bad_lines_are_named(run: Run, tmp_path: Path, line: object, message: str) -> None:
    inputs = write_lines(tmp_path / "in.jsonl", {"prompt": "abc"}, line)
    result = run("generate", "--input", inputs, "--json", "--quiet")
    assert message in result.error
    assert result.error.startswith(f"error: {inputs}, line 2")
    assert "\n" not in result.error
    assert result.stdout == ""


def test_a_file_that_is_no_text_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    assert run("generate", "--input", str(path)).error.startswith(f"error: {path} is not UTF-8")
    path.write_bytes(b"\n\n")
    assert run("generate", "--input", str(path)).error == (
        f"error: {path} has no prompts: all lines are empty"
    )


def test_a_byte_order_mark_is_no_part_of_a_prompt(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"token_ids": [1, 2]}\n')
    result = run("generate", "--input", str(path), "--json", "--quiet", "--max-tokens", "1")
    assert [line["prompt_token_ids"] for line in result.lines] == [[1, 2]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json"],
        ["--input", "x.jsonl", "abc"],
        ["--max-tokens", "0", "abc"],
        ["--cpu", "--gpu", "abc"],
        ["--kv-memory", "lots", "abc"],
        ["--logit-bias", "3", "abc"],
        ["--logit-bias", "a=1", "abc"],
        ["--logit-bias", "1=x", "abc"],
        ["--logprobs", "1", "abc"],
        ["--prompt-logprobs", "0", "abc"],
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
        (["--min-p", "2"], "min_p must be in [0.0, 1.0], got 2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty must be in [0.001, 100.0], got 0.0"),
        (["--presence-penalty", "3"], "presence_penalty must be in [-2.0, 2.0], got 3.0"),
        (["--frequency-penalty", "nan"], "frequency_penalty must be in [-2.0, 2.0], got nan"),
        (["--logit-bias", "1=101"], "logit_bias of token 1 must be in [-100.0, 100.0], got 101.0"),
        (["--logit-bias", "1=1", "--logit-bias", "1=2"], "logit_bias names a token id twice"),
        (["--logit-bias", "12=1"], "prompt 1: token ids of logit_bias must be in [0, 11], got 12"),
        (["--stop", ""], "characters of stop[0] must be in [1, 256], got 0"),
        (["--stop", "s"] * 17, "number of stop must be in [0, 16], got 17"),
        (["--stop-token-id", "12"], "prompt 1: stop_token_ids must be in [0, 11], got 12"),
        (["--n", "0"], "n must be in [1, 16], got 0"),
        (["--n", "17"], "n must be in [1, 16], got 17"),
        (["--min-tokens", "-1"], "min_tokens must be in"),
        (["--min-tokens", "9", "--max-tokens", "8"], "min_tokens (9) is more than max_tokens (8)"),
        (["--json", "--logprobs", "21"], "logprobs must be in [0, 20], got 21"),
        (["--max-tokens", "4096"], "more than max_model_len (128)"),
    ],
)
def test_sampling_limits(run: Run, arguments: list[str], message: str) -> None:
    assert message in run("generate", "--quiet", "abc", *arguments).error


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """An engine without a model, for what a tiny model does not do on purpose."""
    engine = FakeEngine(step_seconds=0.0, late=2)
    served = served_model(engine)

    def load(_options: object, _phases: object, pick_shapes: PickShapes) -> SimpleNamespace:
        spec = SimpleNamespace(
            config=served.engine_config, model=served.model, dtypes=served.dtypes
        )
        planned = SimpleNamespace(spec=spec, shapes=batch_shapes(served.engine_config))
        tokenizer = cast(Tokenizer, served.tokenizer)
        pick_shapes(cast(Engine, planned), tokenizer, SamplingParams(), Ending())
        return SimpleNamespace(
            name="fake",
            engine=engine,
            spec=spec,
            tokenizer=served.tokenizer,
            default_sampling=SamplingParams(),
            default_ending=Ending(),
        )

    monkeypatch.setattr("jaxinfer_entrypoints.llm.load_model", load)
    return engine


def planned_engine(config: EngineConfig) -> Engine:
    spec = SimpleNamespace(config=config)
    return cast(Engine, SimpleNamespace(spec=spec, shapes=batch_shapes(config)))


def test_programs_for_drafts_are_compiled_too() -> None:
    config = EngineConfig(max_num_seqs=16, draft="ngram", num_drafts=7)
    planned = cast(
        Engine, SimpleNamespace(spec=SimpleNamespace(config=config), shapes=batch_shapes(config))
    )
    picked = shapes_for(planned, [Request("a", (1,) * 9, 4)])
    assert picked is not None
    assert [(s.num_decodes, s.num_tiles, s.num_drafts) for s in picked] == [
        *((8, 0, 0), (8, 1, 0), (1, 0, 7), (4, 0, 7), (8, 0, 7))
    ]


@pytest.mark.parametrize(
    ("lengths", "n", "shapes"),
    [
        ([1], 1, [(8, 0), (8, 1)]),
        ([64], 8, [(8, 0), (8, 1)]),
        ([65], 1, [(8, 0), (8, 2)]),
        ([64, 65], 1, [(8, 0), (8, 8)]),
        ([2000], 1, [(8, 0), (8, 8)]),
        ([10] * 9, 1, None),
        ([10], 9, None),
    ],
)
def test_only_what_the_prompts_need_is_compiled(
    lengths: list[int], n: int, shapes: list[tuple[int, int]] | None
) -> None:
    config = EngineConfig(max_num_seqs=16, max_num_batched_tokens=512)
    planned = cast(
        Engine, SimpleNamespace(spec=SimpleNamespace(config=config), shapes=batch_shapes(config))
    )
    requests = [Request(str(i), (1,) * length, 4, n=n) for i, length in enumerate(lengths)]
    picked = shapes_for(planned, requests)
    assert shapes == (picked and [(shape.num_decodes, shape.num_tiles) for shape in picked])


PROMPT = [256, *b"abc"]  # as the fake tokenizer writes "abc"


def test_stop_strings_end_the_text_and_the_work(run: Run, engine: FakeEngine) -> None:
    text = expected_text(PROMPT, 40)
    flags = ["--quiet", "--seed", "0", "--max-tokens", "40", "--stop", "??", "--stop", text[5:8]]
    line = run("generate", "--json", *flags, "abc").lines[0]
    assert (line["text"], line["stop_string"]) == (text[:5], text[5:8])
    assert line["finish_reason"] == "stop"
    assert line["token_ids"] == expected_token_ids(PROMPT, 8)
    assert line["usage"]["completion_tokens"] == 8
    assert engine.aborted_choices == [("0", 0)]
    assert run("generate", *flags, "abc").stdout == text[:5] + "\n"
    later = run("generate", "--json", "--min-tokens", "8", *flags, "abc").lines[0]
    assert later["text"] == text[:31]  # the letters come again after 26


def test_a_stop_token_has_no_text(run: Run, engine: FakeEngine) -> None:
    text = expected_text(PROMPT, 9)
    flags = ["--stop-token-id", "1", "--stop-token-id", str(ord(text[3])), "--seed", "0", "abc"]
    line = run("generate", "--quiet", "--json", *flags).lines[0]
    assert (line["text"], line["finish_reason"]) == (text[:3], "stop")
    assert line["token_ids"][-1] == ord(text[3])
    assert "stop_string" not in line


def test_choices(run: Run, engine: FakeEngine) -> None:
    flags = ["--quiet", "--max-tokens", "6", "--n", "3", "abc", "xyz"]
    lines = run("generate", "--json", *flags).lines
    assert [line["usage"]["completion_tokens"] for line in lines] == [18, 18]
    assert "text" not in lines[0]
    for choice, said in enumerate(lines[0]["choices"]):
        assert said == {
            "token_ids": expected_token_ids(PROMPT, 6, lines[0]["seed"], choice),
            "text": said["text"],
            "finish_reason": "length",
        }
    printed = run("generate", "--seed", str(lines[0]["seed"]), *flags[:-1]).stdout
    assert printed.splitlines() == [said["text"] for said in lines[0]["choices"]]


def test_logprobs(run: Run, engine: FakeEngine) -> None:
    flags = ["--max-tokens", "3", "--logprobs", "1", "--prompt-logprobs", "0", "abc"]
    line = run("generate", "--quiet", "--json", *flags).lines[0]
    assert [entry["token_id"] for entry in line["logprobs"]] == line["token_ids"]
    first = line["token_ids"][0]
    assert line["logprobs"][0] == {
        "token_id": first,
        "logprob": 0.0,
        "rank": 1,
        "top": [[first, 0.0]],
    }
    assert line["prompt_logprobs"][0] is None
    assert [entry["token_id"] for entry in line["prompt_logprobs"][1:]] == PROMPT[1:]


def test_flags_reach_the_engine(run: Run, engine: FakeEngine) -> None:
    flags = ["--min-p", "0.5", "--repetition-penalty", "2", "--presence-penalty", "-1"]
    flags += ["--frequency-penalty", "1.5", "--logit-bias", "3=-2.5", "--logit-bias", "1=4"]
    flags += ["--min-tokens", "2", "--max-tokens", "3", "--seed", "7"]
    assert run("generate", "--quiet", *flags, "abc").error == ""
    (request,) = engine.requests
    assert request.min_tokens == 2
    assert request.sampling == SamplingParams(
        min_p=0.5,
        repetition_penalty=2.0,
        presence_penalty=-1.0,
        frequency_penalty=1.5,
        logit_bias=((3, -2.5), (1, 4.0)),
        seed=7,
    )


def test_missing_input_file(run: Run, tmp_path: Path) -> None:
    result = run("generate", "--input", str(tmp_path / "none.jsonl"))
    assert "none.jsonl" in result.error
    assert result.error.startswith("error: ")


def test_runs_as_a_program_from_anywhere(
    model_path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = str(tmp_path_factory.getbasetemp() / "cache")  # of the other tests of scripts
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--quiet", *SIZES]
    command += ["--model", str(model_path), "--max-tokens", "4", "--json", "abc"]
    environment = {name: os.environ[name] for name in ("XLA_FLAGS",) if name in os.environ}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
        env={**environment, "PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": cache},
    )
    assert len(json.loads(done.stdout)["token_ids"]) <= 4
    assert done.stderr == ""
