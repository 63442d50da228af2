"""``from jaxinfer import LLM``: the front door from Python, on a tiny model."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import jax
import pytest

import jaxinfer
from jaxinfer_entrypoints.llm import LLM
from jaxinfer_entrypoints.loading.options import LoadKeywords, LoadOptions
from serving.client import Completion, Delta, Finished, Message, Started
from tests.jaxinfer_entrypoints.conftest import Run

ROOT = Path(__file__).parents[2]
SIZES: LoadKeywords = {
    "device": "cpu",
    "max_num_seqs": 2,
    "max_num_batched_tokens": 64,
    "kv_memory": 1 << 20,
}


@pytest.fixture(scope="module")
def llm(model_path: Path) -> Iterator[LLM]:
    with LLM(str(model_path), **SIZES) as made:
        yield made
        assert not made.generations.has_unfinished


def test_everything_is_found_where_it_is_looked_for() -> None:
    assert set(jaxinfer.__all__) <= set(dir(jaxinfer))
    assert jaxinfer.LLM is LLM
    assert jaxinfer.Message is Message
    with pytest.raises(AttributeError, match="has no attribute 'LMM'"):
        _ = cast(Any, jaxinfer).LMM


@pytest.mark.parametrize(
    ("code", "absent"),
    [("import jaxinfer", "jax grpc numpy"), ("from jaxinfer import Client, Message", "jax")],
)
def test_what_is_not_asked_for_is_not_imported(code: str, absent: str) -> None:
    code += f"; import sys; print(sys.modules.keys() & set({absent!r}.split()))"
    done = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert done == "set()\n"


def test_the_same_as_the_program(llm: LLM, run: Run) -> None:
    flags = (
        "--json",
        "--max-tokens",
        "9",
        "--temperature",
        "0.8",
        "--seed",
        "5",
        "--logprobs",
        "1",
    )
    lines = run("generate", *flags, "abc", "ab1").lines
    found = llm.generate(["abc", "ab1"], max_tokens=9, temperature=0.8, seed=5, logprobs=1)
    for line, completion in zip(lines, found, strict=True):
        assert completion.text == line["text"]
        assert list(completion.token_ids) == line["token_ids"]
        assert completion.finished.reason == line["finish_reason"]
        assert [entry.logprob for entry in completion.logprobs] == [
            pytest.approx(entry["logprob"], abs=1e-6) for entry in line["logprobs"]
        ]
        assert completion.finished.usage.num_prompt_tokens == line["usage"]["prompt_tokens"]


def test_forms_of_prompts(llm: LLM) -> None:
    one = llm.generate("abc", max_tokens=4)
    assert isinstance(one, Completion)
    assert llm.generate(["abc"], max_tokens=4)[0].token_ids == one.token_ids
    by_ids = llm.generate([3, 4, 5], max_tokens=4)
    assert isinstance(by_ids, Completion)
    several = llm.generate([[3, 4, 5], "abc", (3, 4, 5)], max_tokens=4)
    assert [completion.token_ids for completion in cast(list[Completion], several)] == [
        by_ids.token_ids,
        one.token_ids,
        by_ids.token_ids,
    ]
    assert llm.generate([], max_tokens=4) == []


def test_conversations(llm: LLM) -> None:
    conversation = [Message("user", "abc")]
    answer = llm.chat(conversation, max_tokens=4)
    assert isinstance(answer, Completion)
    both = cast(list[Completion], llm.chat([conversation, conversation], max_tokens=4))
    assert [each.token_ids for each in both] == [answer.token_ids] * 2
    assert cast(Completion, llm.generate(conversation, max_tokens=4)).text == answer.text
    with pytest.raises(TypeError, match="a conversation is a list of Message, got 'abc'"):
        llm.chat(cast(Any, ["abc"]))
    for nothing in ([], conversation[0]):
        with pytest.raises(TypeError, match="a conversation is a list of Message, got"):
            llm.chat(cast(Any, nothing))


def test_a_stream_is_the_same_in_pieces(llm: LLM) -> None:
    whole = llm.generate("abc", max_tokens=9)
    events = list(llm.stream("abc", max_tokens=9))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    deltas = [event for event in events if isinstance(event, Delta)]
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == whole.text
    assert tuple(i for delta in deltas for i in delta.token_ids) == whole.token_ids


def test_streams_that_are_open_at_the_same_time(llm: LLM) -> None:
    alone = [llm.generate(prompt, max_tokens=7).token_ids for prompt in ("abc", "b1")]
    streams = [llm.stream(prompt, max_tokens=7) for prompt in ("abc", "b1")]
    found: list[list[int]] = [[], []]
    for events in zip_longest(*streams):
        for event, tokens in zip(events, found, strict=True):
            tokens += event.token_ids if isinstance(event, Delta) else ()
    assert [tuple(tokens) for tokens in found] == alone


def test_a_stream_that_is_left_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("abc", max_tokens=100, ignore_eos=True)
    next(stream)
    assert llm.generations.has_unfinished
    stream.close()
    while llm.generations.has_unfinished:
        assert llm.generations.step() == []
    llm.stream("abc")  # never begun: costs nothing
    assert not llm.generations.has_unfinished


def test_choices_and_stop_strings(llm: LLM) -> None:
    options: Any = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 6, "ignore_eos": True}
    choices = llm.generate_choices("abc", **options)
    assert len({choice.token_ids for choice in choices}) > 1
    assert choices == llm.generate_choices("abc", **options) or [
        choice.token_ids for choice in choices
    ] == [choice.token_ids for choice in llm.generate_choices("abc", **options)]
    with pytest.raises(ValueError, match="n is 3: generate_choices"):
        llm.generate("abc", **options)
    whole = llm.generate("abc", max_tokens=12, ignore_eos=True)
    stop = whole.text[3:5]
    cut = llm.generate("abc", max_tokens=12, ignore_eos=True, stop=[stop])
    assert cut.finished.stop_string == stop
    assert cut.text == whole.text[: whole.text.index(stop)]


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "message"),
    [
        ("abc", {"max_token": 3}, TypeError, "no option 'max_token'; the nearest is 'max_tokens'"),
        ("abc", {"temperature": -1.0}, ValueError, "temperature must be"),
        ("abc", {"timeout": 3.0}, ValueError, "timeout is for calls of a server"),
        ("abc", {"max_tokens": 10_000}, ValueError, "max_model_len"),
        ([1, 99_999], {}, ValueError, "99999"),
        (["abc", "b" * 500], {}, ValueError, "^prompt 1: .*max_model_len"),
        (["abc", ""], {"request_id": "x"}, ValueError, "request_id 'x' is for one prompt"),
        (3, {}, TypeError, "the prompt must be a text"),
        ([b"abc"], {}, TypeError, "the prompt must be a text"),
        ("abc", {"request_id": "\n"}, ValueError, "request_id must be printable ASCII"),
        ("\ud800", {}, ValueError, "the prompt is not valid Unicode"),
    ],
)
def test_bad_input_is_named_before_anything_runs(
    llm: LLM, prompt: Any, options: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        llm.generate(prompt, **options)
    assert not llm.generations.has_unfinished


def test_a_closed_model_has_given_its_memory_back(model_path: Path) -> None:
    before = {id(array) for array in jax.live_arrays()}
    with LLM(str(model_path), **SIZES) as llm:
        text = llm.generate("abc", max_tokens=4).text
        stream = llm.stream("abc", max_tokens=4)
        next(stream)
    assert text
    assert {id(a) for a in jax.live_arrays() if not a.is_deleted()} <= before
    llm.close()
    for call in (lambda: llm.generate("abc"), lambda: next(stream), lambda: llm.engine):
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            call()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_seqs": 3}, TypeError, "LLM has no option 'max_seqs'; the nearest is 'max_num_seqs'"),
        ({"max_num_seqs": "3"}, ValueError, "max_num_seqs must be an integer, got '3'"),
        ({"max_num_seqs": True}, ValueError, "max_num_seqs must be an integer, got True"),
        ({"prefix_cache": 1}, ValueError, "prefix_cache must be True or False, got 1"),
        ({"device": "tpu"}, ValueError, "no TPU is called 'tpu'"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of None, float32, bfloat16, got"),
        ({"quantize": "int3"}, ValueError, "quantize must be one of None, .*got 'int3'"),
        ({"kv_memory": 0}, ValueError, "kv_memory must be between 1 and"),
        ({"data_parallel": 2}, ValueError, "data_parallel must be 1 for LLM, got 2"),
        ({"compile_only": True}, ValueError, "compile_only loads nothing"),
        ({"model": ""}, ValueError, "model '' is neither a file or folder nor a known name"),
        ({"model": "/nowhere.gguf"}, ValueError, "/nowhere.gguf"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be between 1 and 1024, got 0"),
    ],
)
def test_options_that_cannot_be(
    model_path: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        LLM(**cast(Any, {"model": str(model_path), "device": "cpu"} | options))


def test_keywords_are_the_fields() -> None:
    assert {*LoadKeywords.__annotations__} | {"model"} == {f.name for f in fields(LoadOptions)}
