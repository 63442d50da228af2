"""Log-probabilities against plain NumPy in float64, and their bits against other batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.logprobs import NUM_TOP, LogprobColumns, token_logprobs
from jaxinfer.request import LIMITS
from jaxinfer.row_log import row_log
from tests.jaxinfer.sampling_rows import random_logits
from tests.thorough import thorough_beyond


def measure(logits: np.ndarray, token_ids: np.ndarray, is_wanted: bool = True) -> LogprobColumns:
    wanted = np.zeros(len(logits), bool)
    wanted[-1] = is_wanted
    arguments = (jnp.asarray(logits), jnp.asarray(token_ids, jnp.int32), jnp.asarray(wanted))
    return jax.tree.map(np.asarray, jax.jit(token_logprobs)(*arguments))


@pytest.mark.parametrize("vocab", [20, 96, 301, 1024, 1025, 49152])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_logprobs_follow_the_definition(vocab: int, scale: float) -> None:
    logits = random_logits(8, vocab) * np.float32(scale)
    token_ids = np.random.RandomState(1).randint(0, vocab, 8)
    token_ids[0] = logits[0].argmax()
    got = measure(logits, token_ids)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True))
    exact -= logits.max(-1, keepdims=True)
    order = np.argsort(-logits, axis=-1, kind="stable")
    chosen = exact[np.arange(8), token_ids]
    np.testing.assert_allclose(got.logprob, chosen, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(got.rank, 1 + (exact > chosen[:, None]).sum(-1))
    np.testing.assert_array_equal(got.top_ids, order[:, :NUM_TOP])
    best = np.take_along_axis(exact, order[:, :NUM_TOP], axis=-1)
    np.testing.assert_allclose(got.top_logprobs, best, rtol=2e-6, atol=2e-6)


def test_as_many_as_a_request_may_ask_for() -> None:
    assert LIMITS["logprobs"].high == LIMITS["prompt_logprobs"].high == NUM_TOP


def test_the_chosen_token_has_the_same_bits_in_the_top() -> None:
    logits = random_logits(8, 1000)
    got = measure(logits, logits.argmax(-1))
    np.testing.assert_array_equal(got.logprob, got.top_logprobs[:, 0])
    np.testing.assert_array_equal(got.rank, 1)


@pytest.mark.parametrize("vocab", [96, 49152])
def test_ties_share_a_rank_and_come_by_id(vocab: int) -> None:
    """Few different values, so that ties cross the end of the top."""
    logits = np.random.RandomState(0).randint(0, 12, (8, vocab)).astype(np.float32)
    logits[0] = 1.0
    got = measure(logits, np.full(8, vocab - 1))
    order = np.argsort(-logits, axis=-1, kind="stable")
    np.testing.assert_array_equal(got.top_ids, order[:, :NUM_TOP])
    np.testing.assert_array_equal(got.rank, 1 + (logits > logits[:, -1:]).sum(-1))
    assert got.rank[0] == 1


def test_where_nobody_asks_all_is_zero_and_nothing_is_computed() -> None:
    logits = random_logits(8, 300)
    for array in jax.tree.leaves(measure(logits, np.arange(8), is_wanted=False)):
        np.testing.assert_array_equal(array, 0)
    program = jax.make_jaxpr(token_logprobs)(
        logits, jnp.zeros(8, jnp.int32), jnp.zeros(8, jnp.bool_)
    )
    unconditional = [e for e in program.eqns if e.primitive.name != "cond"]
    assert all(np.prod(var.aval.shape) <= 8 for e in unconditional for var in e.outvars)  # type: ignore[attr-defined]


def test_extreme_logits_stay_defined() -> None:
    logits = random_logits(8, 300)
    logits[:4] *= 1e37
    logits[2, 5:] = -np.inf
    got = measure(logits, np.arange(8))
    assert not any(np.isnan(array).any() for array in jax.tree.leaves(got))
    assert got.top_logprobs[2, 6] == -np.inf
    assert (got.logprob <= 0).all()


@pytest.mark.parametrize(
    "vocab", thorough_beyond([301], [96, 301, 49152, 50257, 151936], "large vocabularies")
)
def test_bits_do_not_depend_on_the_batch(vocab: int) -> None:
    logits = random_logits(40, vocab)
    token_ids = np.random.RandomState(1).randint(0, vocab, 40)
    together = measure(logits, token_ids)
    for count in (8, 11, 16, 24):
        part = slice(40 - count, 40)
        jax.tree.map(
            lambda alone, all_rows, part=part: np.testing.assert_array_equal(alone, all_rows[part]),
            measure(logits[part], token_ids[part]),
            together,
        )


def test_row_log_has_the_same_bits_for_any_number_of_rows() -> None:
    """Many numbers, since few of them have another last bit in a batch of 5, 6, 7 or 15."""
    x = np.random.RandomState(0).uniform(1e-3, 1, 1024).astype(np.float32)
    compiled = jax.jit(row_log)
    together = np.asarray(compiled(x))
    np.testing.assert_allclose(together, np.log(x.astype(np.float64)), rtol=1e-6, atol=1e-6)
    for count in (1, 3, 5, 6, 7, 8, 9, 11, 15, 17, 40):
        parts = [compiled(x[start : start + count]) for start in range(0, 1024, count)][:-1]
        np.testing.assert_array_equal(np.concatenate(parts), together[: count * len(parts)])
