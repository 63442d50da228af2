"""The sampler against plain NumPy definitions, and the noise against statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sampling import SamplingColumns, gumbel_noise, sample

VOCAB = 300


def columns(rows: int, **values: object) -> SamplingColumns:
    """Greedy rows, with some columns replaced."""
    seeds = np.stack([np.arange(rows), np.zeros(rows)], axis=1)
    base = {
        "temperature": np.zeros(rows),
        "top_k": np.zeros(rows),
        "top_p": np.ones(rows),
        "seeds": seeds,
        "choices": np.zeros(rows),
    }
    base |= {name: np.broadcast_to(value, base[name].shape) for name, value in values.items()}  # type: ignore[arg-type]
    dtypes = {"temperature": "float32", "top_p": "float32", "seeds": "uint32"}
    return SamplingColumns(
        **{name: jnp.asarray(v.astype(dtypes.get(name, "int32"))) for name, v in base.items()}
    )


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    return (3 * np.random.RandomState(seed).standard_normal((rows, vocab))).astype(np.float32)


def draw(logits: np.ndarray, positions: np.ndarray, wanted: SamplingColumns) -> np.ndarray:
    return np.asarray(jax.jit(sample)(jnp.asarray(logits), jnp.asarray(positions), wanted))


def allowed(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens survive, by sorting: the definition."""
    scaled = logits.astype(np.float64) / temperature
    kept = np.ones(len(logits), bool)
    if top_k:
        kept &= scaled >= np.sort(scaled)[::-1][min(top_k, len(scaled)) - 1]
    if top_p < 1:
        weights = np.where(kept, np.exp(scaled - scaled.max()), 0)
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order]) / weights.sum()
        last = order[min(int(np.searchsorted(mass, top_p - 1e-9)), len(order) - 1)]
        kept &= scaled >= scaled[last]
    return kept


def test_greedy_is_the_first_arg_max() -> None:
    logits = random_logits(16)
    logits[3, [7, 9]] = logits[3].max() + 1
    np.testing.assert_array_equal(draw(logits, np.arange(16), columns(16)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (0, 0.01), (20, 0.8), (9999, 0.9)]
)
def test_sampled_token_is_the_noisy_arg_max_of_the_survivors(
    temperature: float, top_k: int, top_p: float
) -> None:
    rows = 64
    logits, positions = random_logits(rows, seed=top_k), np.arange(rows)
    wanted = columns(rows, temperature=temperature, top_k=top_k, top_p=top_p)
    noise = np.asarray(gumbel_noise(wanted.seeds, wanted.choices, jnp.asarray(positions), VOCAB))
    tokens = draw(logits, positions, wanted)
    for row in range(rows):
        kept = allowed(logits[row], temperature, top_k, top_p)
        noisy = np.where(kept, logits[row].astype(np.float64) / temperature + noise[row], -np.inf)
        assert tokens[row] == noisy.argmax()


def test_ties_with_the_last_survivor_are_kept() -> None:
    logits = np.full((8, VOCAB), -5, np.float32)
    logits[:, :10] = 4
    tied = [draw(logits, np.full(8, p), columns(8, temperature=1, top_k=3)) for p in range(40)]
    assert set(np.concatenate(tied)) == set(range(10))


def test_draws_follow_the_softmax() -> None:
    """Chi-squared over 40,000 draws of neighbouring positions and seeds, 9 degrees of freedom."""
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, 0.2, 1.2], np.float32)
    rows, positions = 200, 200
    sampler = jax.jit(sample)
    counts = np.zeros(10)
    for position in range(positions):
        tokens = sampler(
            jnp.tile(logits, (rows, 1)),
            jnp.full(rows, position, jnp.int32),
            columns(rows, temperature=1.0),
        )
        counts += np.bincount(np.asarray(tokens), minlength=10)
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


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows, vocab = 40, 49152
    logits = random_logits(rows, vocab)
    wanted = columns(rows, temperature=0.9, top_k=np.arange(rows) * 7, top_p=0.95)
    positions = np.arange(rows)
    together = draw(logits, positions, wanted)
    for first in range(0, rows, 8):
        part = slice(first, first + 8)
        alone = jax.tree.map(lambda column, part=part: column[part], wanted)
        np.testing.assert_array_equal(draw(logits[part], positions[part], alone), together[part])


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = random_logits(16)
    temperature = np.where(np.arange(16) % 2, 1.0, 0.0)
    tokens = draw(logits, np.arange(16), columns(16, temperature=temperature))
    np.testing.assert_array_equal(tokens[::2], logits.argmax(-1)[::2])
    np.testing.assert_array_equal(
        tokens[1::2], draw(logits, np.arange(16), columns(16, temperature=1.0))[1::2]
    )


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 100.0])
def test_extreme_temperatures_stay_defined(temperature: float) -> None:
    logits = random_logits(8) * 1e4
    tokens = draw(logits, np.arange(8), columns(8, temperature=temperature, top_p=0.9))
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    if temperature < 1:
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
