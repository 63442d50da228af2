"""Penalties, biases and ``min_tokens`` against plain NumPy, over tables full of junk."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.penalties import COUNT_BLOCK_TOKENS, adjusted, changes_logits
from tests.jaxinfer.sampling_rows import (
    Rows,
    expected_logits,
    make_columns,
    plain_rows,
    random_logits,
    random_rows,
)
from tests.thorough import thorough_beyond

VOCAB = 300
# Where it says True, ``random_rows`` draws another value for each row.
FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition": {"repetition_penalty": 1.3},
    "repetition below 1": {"repetition_penalty": 1e-3},
    "repetition at most": {"repetition_penalty": 100.0},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "reward": {"presence_penalty": -2.0, "frequency_penalty": -2.0},
    "bias": {"num_biases": True},
    "min_tokens": {"min_tokens": True},
    "all": {
        "repetition_penalty": 1.7,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.3,
        "num_biases": True,
        "min_tokens": True,
    },
}


def adjust(rows: Rows) -> np.ndarray:
    return np.asarray(jax.jit(adjusted)(*rows.arguments))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(
    "max_len", [200, 2 * COUNT_BLOCK_TOKENS, COUNT_BLOCK_TOKENS - 1, 3 * COUNT_BLOCK_TOKENS + 1]
)
def test_adjusted_logits_follow_the_definition(name: str, max_len: int) -> None:
    rows = random_rows(24, VOCAB, max_len=max_len, seed=max_len, **FEATURES[name])
    got = adjust(rows)
    wanted = np.stack([expected_logits(rows, row) for row in range(24)])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    is_plain = np.arange(24) % 2 == 0
    is_plain |= rows.slots == rows.tables.tokens.shape[0]
    np.testing.assert_array_equal(got[is_plain], rows.logits[is_plain])
    # The test would pass with nothing done if nothing was asked for.
    assert (np.abs(wanted - rows.logits).max() > 0.1) == (name != "nothing")


@pytest.mark.parametrize("name", FEATURES)
def test_rows_that_change_are_told_beforehand(name: str) -> None:
    rows = random_rows(24, VOCAB, **FEATURES[name])
    changes = np.asarray(changes_logits(*rows.arguments[1:]))
    differs = np.array(
        [(expected_logits(rows, row) != rows.logits[row]).any() for row in range(24)]
    )
    assert (changes | ~differs).all()
    assert not changes[rows.slots == rows.tables.tokens.shape[0]].any()
    assert not changes[::2].any()


def test_min_tokens_counts_new_tokens_only() -> None:
    """The first two of three tokens may not be an ending; the third may."""
    logits, prompt_lens = random_logits(4, VOCAB), np.array([5, 5, 5, 5])
    columns = make_columns(4, prompt_lens=prompt_lens, min_tokens=2, ending_ids=[9] + [-1] * 31)
    got = adjust(plain_rows(logits, np.array([5, 6, 7, 8]), columns))
    np.testing.assert_array_equal(np.isinf(got).nonzero(), [[0, 1], [9, 9]])


def test_a_bias_cannot_bring_an_ending_back() -> None:
    rows = plain_rows(
        random_logits(8, VOCAB),
        np.full(8, 4),
        make_columns(8, prompt_lens=4, min_tokens=1, num_biases=1, ending_ids=[9] + [-1] * 31),
    )
    tables = jax.tree.map(np.array, rows.tables)
    tables.bias_ids[:, 0], tables.bias_values[:, 0] = 9, 100.0
    rows.tables = jax.tree.map(jnp.asarray, tables)
    assert (adjust(rows)[:, 9] == -np.inf).all()


@pytest.mark.parametrize("penalty", [1e-38, 1e-3, 100.0])
def test_extreme_penalties_stay_finite(penalty: float) -> None:
    rows = random_rows(24, VOCAB, repetition_penalty=penalty, frequency_penalty=2.0)
    rows.logits *= np.float32(1e37)
    assert np.isfinite(adjust(rows)).all()


@pytest.mark.parametrize("vocab", thorough_beyond([301], [301, 49152], "large vocabularies"))
def test_a_row_does_not_depend_on_its_neighbours(vocab: int) -> None:
    rows = random_rows(40, vocab, **FEATURES["all"])
    together = adjust(rows)
    for count in (8, 11, 15, 24):
        np.testing.assert_array_equal(adjust(rows.pick(slice(count))), together[:count])
    order = np.random.RandomState(1).permutation(40)
    np.testing.assert_array_equal(adjust(rows.pick(order)), together[order])
