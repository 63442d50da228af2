"""A folder's words on sampling."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.hugging_face.generation_config import read_default_sampling
from jaxinfer.request import SamplingParams


def write(folder: Path, fields: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))


def test_qwens(tmp_path: Path) -> None:
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    write(tmp_path, {**sampled, "repetition_penalty": 1.05, "eos_token_id": [1, 2]})
    assert read_default_sampling(tmp_path) == SamplingParams(
        temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
    )


def test_greedy_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert read_default_sampling(tmp_path) == SamplingParams()
    write(tmp_path, {"temperature": 0.7, "top_p": None, "repetition_penalty": 1.1})
    assert read_default_sampling(tmp_path) == SamplingParams(repetition_penalty=1.1)
    write(tmp_path, {"do_sample": True})
    assert read_default_sampling(tmp_path) == SamplingParams(temperature=1.0)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ([], r"generation_config.json: must be a JSON object"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"do_sample": True, "temperature": True}, "temperature must be a number, got True"),
        ({"do_sample": True, "top_p": 1.5}, r"generation_config.json: top_p must be in \(0"),
        ({"do_sample": True, "top_k": 1.5}, r"generation_config.json: top_k"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be in \[0.001"),
    ],
)
def test_what_no_request_may_ask_for(tmp_path: Path, fields: Any, match: str) -> None:
    write(tmp_path, fields)
    with pytest.raises(ValueError, match=match):
        read_default_sampling(tmp_path)
