"""The sampler against plain NumPy definitions, and the noise against statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sampling import SamplingColumns, gumbel_noise, sample
from tests.jaxinfer.sampling_rows import (
    Rows,
    expected_logits,
    make_columns,
    plain_rows,
    random_logits,
    random_rows,
    survivors,
)
from tests.thorough import thorough_beyond

VOCAB = 300
EVERYTHING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.2,
    "num_biases": True,
    "min_tokens": True,
}


def draw(logits: np.ndarray, positions: np.ndarray, columns: SamplingColumns) -> np.ndarray:
    return draw_rows(plain_rows(logits, positions, columns))


def draw_rows(rows: Rows) -> np.ndarray:
    return np.asarray(jax.jit(sample)(*rows.arguments))


def expected_tokens(rows: Rows) -> list[int]:
    """Row by row, by the definition; the noise is the sampler's own."""
    columns, vocab = rows.columns, rows.logits.shape[1]
    noise = gumbel_noise(columns.seeds, columns.choices, jnp.asarray(rows.positions), vocab)
    tokens = []
    for row in range(len(rows.logits)):
        logits = expected_logits(rows, row)
        temperature, top_k, top_p, min_p = (
            np.asarray(column)[row].item()
            for column in (columns.temperature, columns.top_k, columns.top_p, columns.min_p)
        )
        if temperature > 0:
            kept = survivors(logits, temperature, top_k, top_p, min_p)
            logits = np.where(kept, logits / temperature + np.asarray(noise)[row], -np.inf)
        tokens.append(int(logits.argmax()))
    return tokens


def test_greedy_is_the_first_arg_max() -> None:
    logits = random_logits(16, VOCAB)
    logits[3, [7, 9]] = logits[3].max() + 1
    np.testing.assert_array_equal(draw(logits, np.arange(16), make_columns(16)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (0, 0.01), (20, 0.8), (9999, 0.9)]
)
def test_sampled_token_is_the_noisy_arg_max_of_the_survivors(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    columns = make_columns(64, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = plain_rows(random_logits(64, VOCAB, seed=top_k), np.arange(64), columns)
    np.testing.assert_array_equal(draw_rows(rows), expected_tokens(rows))


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_each_feature_beside_plain_rows(name: str, temperature: float) -> None:
    """Every other row has the feature; some are padding."""
    values: dict[str, Any] = {"temperature": temperature, name: EVERYTHING[name]}
    rows = random_rows(48, VOCAB, seed=len(name), **values)
    np.testing.assert_array_equal(draw_rows(rows), expected_tokens(rows))


@pytest.mark.parametrize("seed", range(6))
def test_all_features_at_once(seed: int) -> None:
    random = np.random.RandomState(seed)
    values: dict[str, Any] = EVERYTHING | {
        "temperature": random.choice([0.0, 0.5, 2.0], 48),
        "top_k": random.choice([0, 1, 40], 48),
        "top_p": random.choice([0.3, 0.9, 1.0], 48),
        "min_p": random.choice([0.0, 0.05, 1.0], 48),
        "repetition_penalty": random.choice([0.5, 1.0, 1.3], 48),
        "frequency_penalty": random.choice([-0.2, 0.0, 1.0], 48),
    }
    rows = random_rows(48, VOCAB, seed=seed, **values)
    np.testing.assert_array_equal(draw_rows(rows), expected_tokens(rows))


def test_endings_may_leave_a_single_token() -> None:
    """33 tokens, of which 32 would end the choice too early."""
    ending_ids = np.delete(np.arange(33), 17)
    for temperature, top_p in ((0.0, 1.0), (1e-6, 1.0), (1.0, 1.0), (100.0, 0.5)):
        columns = make_columns(
            8, temperature=temperature, top_p=top_p, min_tokens=1, ending_ids=ending_ids
        )
        logits = random_logits(8, 33)
        logits[:, 17] = -1e30
        assert (draw(logits, np.zeros(8), columns) == 17).all()


def test_plain_greedy_rows_pay_for_one_arg_max() -> None:
    """Nothing of the size of the logits outside the branches, and little in the last one."""
    rows = plain_rows(random_logits(8, VOCAB), np.arange(8), make_columns(8))
    program = jax.make_jaxpr(sample)(*rows.arguments).jaxpr
    outer = [e for e in program.eqns if e.primitive.name == "cond"]
    assert len(outer) == 1
    others = [e for e in program.eqns if e.primitive.name != "cond"]
    assert all(np.prod(var.aval.shape) <= 8 for e in others for var in e.outvars)  # type: ignore[attr-defined]
    greedy, _ = outer[0].params["branches"]
    assert len(str(greedy).splitlines()) < 20
    # Padding rows are all zeros: no penalty of 0, no top_p of 0 switches anything on.
    nobody = jax.tree.map(jnp.zeros_like, rows.columns)
    tables = jax.tree.map(jnp.zeros_like, rows.tables)
    padding = Rows(rows.logits, rows.positions, np.full(8, 8, np.int32), nobody, tables)
    np.testing.assert_array_equal(draw_rows(padding), rows.logits.argmax(-1))


def test_ties_with_the_last_survivor_are_kept() -> None:
    logits = np.full((8, VOCAB), -5, np.float32)
    logits[:, :10] = 4
    tied = [draw(logits, np.full(8, p), make_columns(8, temperature=1, top_k=3)) for p in range(40)]
    assert set(np.concatenate(tied)) == set(range(10))


def test_draws_follow_the_softmax() -> None:
    """Chi-squared over 40,000 draws of neighbouring positions and seeds, 9 degrees of freedom."""
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, 0.2, 1.2], np.float32)
    rows, positions = 200, 200
    columns = make_columns(rows, temperature=1.0)
    counts = np.zeros(10)
    for position in range(positions):
        tokens = draw(np.tile(logits, (rows, 1)), np.full(rows, position), columns)
        counts += np.bincount(tokens, minlength=10)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    expected = probabilities * rows * positions
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # the 0.1 % point


def test_noise_is_standard_gumbel_and_uncorrelated() -> None:
    seeds = jnp.asarray(np.stack([np.arange(64), np.zeros(64)], 1).astype(np.uint32))
    zeros, ones = jnp.zeros(64, jnp.int32), jnp.ones(64, jnp.int32)
    base = np.asarray(gumbel_noise(seeds, zeros, zeros, 4096), np.float64)
    assert np.isfinite(base).all()
    assert abs(base.mean() - np.euler_gamma) < 0.01  # standard error 0.0025
    assert abs(base.var() - np.pi**2 / 6) < 0.03
    others = {
        "next position": gumbel_noise(seeds, zeros, ones, 4096),
        "next choice": gumbel_noise(seeds, ones, zeros, 4096),
        "high seed word": gumbel_noise(seeds.at[:, 1].set(1), zeros, zeros, 4096),
        "next seed": np.roll(base, 1, axis=0),
        "next token": np.roll(base, 1, axis=1),
    }
    for name, other in others.items():
        correlation = np.corrcoef(base.ravel(), np.asarray(other, np.float64).ravel())[0, 1]
        assert abs(correlation) < 0.008, name  # four standard errors


@pytest.mark.parametrize("vocab", thorough_beyond([301], [301, 49152], "large vocabularies"))
def test_a_row_does_not_depend_on_its_neighbours(vocab: int) -> None:
    values: dict[str, Any] = EVERYTHING | {"top_k": np.arange(40) * 7}
    rows = random_rows(40, vocab, **values)
    together = draw_rows(rows)
    for count in (8, 9, 15, 24):
        part = slice(40 - count, 40)
        np.testing.assert_array_equal(draw_rows(rows.pick(part)), together[part])
    order = np.random.RandomState(1).permutation(40)
    np.testing.assert_array_equal(draw_rows(rows.pick(order)), together[order])


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = random_logits(16, VOCAB)
    temperature = np.where(np.arange(16) % 2, 1.0, 0.0)
    tokens = draw(logits, np.arange(16), make_columns(16, temperature=temperature))
    np.testing.assert_array_equal(tokens[::2], logits.argmax(-1)[::2])
    np.testing.assert_array_equal(
        tokens[1::2], draw(logits, np.arange(16), make_columns(16, temperature=1.0))[1::2]
    )


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 100.0])
def test_extreme_temperatures_stay_defined(temperature: float) -> None:
    logits = random_logits(8, VOCAB) * 1e4
    tokens = draw(logits, np.arange(8), make_columns(8, temperature=temperature, top_p=0.9))
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    if temperature < 1:
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
