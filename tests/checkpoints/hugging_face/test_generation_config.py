"""A folder's words on sampling."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.hugging_face.generation_config import read_generation
from jaxinfer.request import Ending, SamplingParams


def read_default_sampling(folder: Path) -> SamplingParams:
    return read_generation(folder, 100).sampling


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


def test_tokens_that_never_come(tmp_path: Path) -> None:
    """A bias as low as a request may have; ids beyond the vocabulary are nobody's."""
    write(
        tmp_path,
        {
            "suppress_tokens": [7, 3, 100],
            "bad_words_ids": [[5]],
            "sequence_bias": [[[9], 2.5], [[7], 1.0]],
        },
    )
    found = read_generation(tmp_path, 100)
    assert found.sampling.logit_bias == ((3, -100.0), (5, -100.0), (7, -100.0), (9, 2.5))
    assert found.unread == ()


def test_ends_of_texts(tmp_path: Path) -> None:
    write(tmp_path, {"stop_strings": ["</s>", "User:"], "min_new_tokens": 5})
    found = read_generation(tmp_path, 100)
    assert (found.ending, found.unread) == (Ending(("</s>", "User:"), 5), ())
    write(tmp_path, {"stop_strings": "END"})
    assert read_generation(tmp_path, 100).ending == Ending(("END",))


def test_what_comes_to_nothing_is_named(tmp_path: Path) -> None:
    named = {
        "no_repeat_ngram_size": 3,
        "begin_suppress_tokens": [220, 50256],
        "forced_eos_token_id": 2,
        "forced_decoder_ids": [[1, 50259]],
        "encoder_no_repeat_ngram_size": 2,
        "encoder_repetition_penalty": 1.5,
        "num_beams": 4,
        "penalty_alpha": 0.6,
        "guidance_scale": 1.5,
        "exponential_decay_length_penalty": [5, 1.1],
        "max_new_tokens": 2048,
        "min_length": 4,
        "presence_penalty": 0.5,
        "bad_words_ids": [[1, 2], [3]],
        "sequence_bias": [[[1, 2], -1.0]],
        "stop_strings": ["x" * 257],
        "token_healing": True,
        "something_new": "x" * 99,
    }
    write(tmp_path, named)
    unread = read_generation(tmp_path, 100).unread
    assert [line.split(" ")[0] for line in unread] == list(named)
    assert unread[0] == "no_repeat_ngram_size 3"
    assert all(len(line) < 110 for line in unread)
    assert read_generation(tmp_path, 100).sampling == SamplingParams()


def test_more_biases_than_a_request_may_have(tmp_path: Path) -> None:
    write(tmp_path, {"suppress_tokens": list(range(301)), "bad_words_ids": [[1]]})
    found = read_generation(tmp_path, 1000)
    assert found.sampling.logit_bias == ((1, -100.0),)
    assert found.unread[0].startswith("suppress_tokens [0, 1")


def test_what_is_off_is_not_named(tmp_path: Path) -> None:
    off = {
        **{"num_beams": 1, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0},
        **{"suppress_tokens": None, "begin_suppress_tokens": [], "penalty_alpha": None},
        **{"max_length": 20, "min_length": 0, "use_cache": True, "guidance_scale": None},
        **{"transformers_version": "4.52.0", "_from_model_config": True, "pad_token_id": 0},
        **{"cache_implementation": "hybrid", "early_stopping": True, "top_k": 50},
        **{"temperature": 0.6, "typical_p": 0.5, "output_scores": True, "min_new_tokens": 0},
    }
    write(tmp_path, off)
    assert read_generation(tmp_path, 100).unread == ()
    write(tmp_path, {**off, "do_sample": True, "epsilon_cutoff": 3e-4})
    assert read_generation(tmp_path, 100).unread == ("typical_p 0.5", "epsilon_cutoff 0.0003")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"suppress_tokens": 3}, "suppress_tokens must be a list of token ids, got 3"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens must have token ids, got 'a'"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a list of lists"),
        ({"sequence_bias": [[1]]}, "sequence_bias must be pairs"),
        ({"sequence_bias": [[[1], 101]]}, r"bias of token 1 in sequence_bias must be in \[-100"),
        ({"sequence_bias": [[[True], 1]]}, "sequence_bias must have token ids, got True"),
        ({"stop_strings": [3]}, "stop_strings must be a list of strings"),
        ({"min_new_tokens": -1}, r"generation_config.json: min_new_tokens must be in \[0"),
        ({"min_new_tokens": 1.5}, r"min_new_tokens must be a whole number, got 1\.5"),
    ],
)
def test_what_cannot_be(tmp_path: Path, fields: Any, match: str) -> None:
    write(tmp_path, fields)
    with pytest.raises(ValueError, match=match):
        read_generation(tmp_path, 100)
