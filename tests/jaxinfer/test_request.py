import math

import pytest

from jaxinfer.request import LIMITS, Limit, Request, SamplingParams


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"seed": -1},
        {"seed": 1 << 64},
        {"seed": 0.5},
        {"seed": "7"},
    ],
)
def test_sampling_params_refuse_what_is_outside_the_table(fields: dict) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        SamplingParams(**fields)


def test_sampling_params_take_both_ends_of_every_range() -> None:
    SamplingParams(temperature=0.0, top_k=0, top_p=1.0, seed=0)
    SamplingParams(temperature=100.0, top_k=1 << 20, top_p=1e-9, seed=(1 << 64) - 1)


def test_limit_message_names_value_and_limit() -> None:
    with pytest.raises(ValueError, match=r"^top_p must be in \(0.0, 1.0\], got 0$"):
        LIMITS["top_p"].check("top_p", 0)
    with pytest.raises(ValueError, match=r"^n must be in \[1, 16\], got 17$"):
        Limit(1, 16).check("n", 17)


@pytest.mark.parametrize("max_tokens", [0, -1, (1 << 20) + 1])
def test_request_refuses_max_tokens(max_tokens: int) -> None:
    with pytest.raises(ValueError, match="max_tokens must be in"):
        Request("a", (1,), max_tokens)


def test_request_refuses_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        Request("a", (), 1)


def test_check_length_counts_prompt_and_output() -> None:
    request = Request("a", (1, 2, 3), max_tokens=5)
    request.check_length(8)
    with pytest.raises(ValueError, match=r"is 8, more than max_model_len \(7\)"):
        request.check_length(7)


def test_check_fits_looks_at_length_and_vocabulary() -> None:
    request = Request("a", (0, 9), max_tokens=1)
    request.check_fits(num_tokens=10, max_model_len=3)
    with pytest.raises(ValueError, match="max_model_len"):
        request.check_fits(num_tokens=10, max_model_len=2)
    with pytest.raises(ValueError, match=r"must be in \[0, 8\], got 9"):
        request.check_fits(num_tokens=9, max_model_len=3)
    with pytest.raises(ValueError, match="got -1"):
        Request("a", (-1, 9), max_tokens=1).check_fits(num_tokens=9, max_model_len=3)
