"""Checks and defaults of requests, without any door."""

import pytest

from serving.request_checks import (
    DEFAULT_MAX_TOKENS,
    check_request_id,
    check_token_ids,
    default_max_tokens,
    random_seed,
)


@pytest.mark.parametrize("request_id", ["a", "~" * 128])
def test_ids_that_can_be_logged_are_taken(request_id: str) -> None:
    check_request_id(request_id)


@pytest.mark.parametrize(
    ("request_id", "says"),
    [
        ("", r"characters of request_id must be in \[1, 128\], got 0"),
        ("a" * 129, "got 129"),
        ("a\n", "request_id must be printable ASCII"),
        ("ä", "request_id must be printable ASCII"),
    ],
)
def test_other_ids_are_refused(request_id: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_request_id(request_id)


def test_token_ids_are_those_of_the_vocabulary() -> None:
    check_token_ids((), 10)
    check_token_ids((0, 9), 10)
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 9\], got 10"):
        check_token_ids((0, 10), 10)
    with pytest.raises(ValueError, match="number of token_ids"):
        check_token_ids((0,) * ((1 << 20) + 1), 10)


def test_the_default_length_fits_behind_the_prompt() -> None:
    assert default_max_tokens(1, 100) == 99
    assert default_max_tokens(99, 100) == 1
    assert default_max_tokens(1, 10_000) == DEFAULT_MAX_TOKENS
    with pytest.raises(ValueError, match="the prompt has 100 tokens, which leaves no room"):
        default_max_tokens(100, 100)


def test_seeds_differ_and_are_doubles() -> None:
    seeds = [random_seed() for _ in range(8)]
    assert len(set(seeds)) == 8
    assert all(int(float(seed)) == seed for seed in seeds)
