"""Speculative sampling: whatever is drafted, tokens are distributed as the target would have them.

Frequencies are held against probabilities by a G-test (2 * sum of n * log(n / expected), which is
chi-squared for the right distribution). Noise is a function of the seeds, so nothing is flaky.
"""

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from jaxinfer.config import DraftModel
from jaxinfer.engine import Engine
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sampling import gumbel_noise
from jaxinfer.speculation.drafts import Drafts
from jaxinfer.speculation.rejection import DRAFT_NOISE, after_rejection
from tests.jaxinfer.test_engine import shared_engine
from tests.jaxinfer.tiny import (
    CPU_DTYPES,
    few_shapes,
    random_parameters,
    run_all,
    tiny_config,
    tiny_model,
    tiny_spec,
)
from tests.thorough import thorough_beyond

NUM_ROWS, NUM_DRAFTS, VOCAB_SIZE = 40_000, 2, 6


def g_test(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The probability of counts as unlikely as these, were ``probabilities`` right."""
    assert counts[probabilities == 0].sum() == 0, "drawn what cannot be"
    is_possible = probabilities > 0
    counts, expected = counts[is_possible], counts.sum() * probabilities[is_possible]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(counts > 0, counts * np.log(counts / expected), 0)
    return float(chi2.sf(2 * terms.sum(), len(counts) - 1))


def distributions(seed: int, sharpness: float, zeros: int = 0) -> np.ndarray:
    """[K + 1, V] probabilities, the first ``zeros`` tokens left out."""
    logits = np.random.default_rng(seed).normal(size=(NUM_DRAFTS + 1, VOCAB_SIZE)) * sharpness
    logits[:, :zeros] = -np.inf
    weights = np.exp(logits)
    return weights / weights.sum(axis=1, keepdims=True)


def tokens_of(target: np.ndarray, draft: np.ndarray, num_drafts: int) -> tuple[np.ndarray, ...]:
    """Tokens [D, K + 1] and how many of them are new, [D]; each row has a seed of its own."""
    rows = jnp.arange(NUM_ROWS, dtype=jnp.uint32)
    seeds = jnp.stack([rows, rows * 7 + 1], axis=1)
    choices = jnp.zeros(NUM_ROWS, jnp.int32)
    positions = jnp.broadcast_to(5 + jnp.arange(NUM_DRAFTS + 1), (NUM_ROWS, NUM_DRAFTS + 1))

    def draw(probabilities: np.ndarray, number: int, use: int) -> Any:
        noise = gumbel_noise(seeds, choices, positions[:, number], VOCAB_SIZE, use)
        return jnp.argmax(jnp.log(jnp.asarray(probabilities[number]))[None] + noise, axis=1)

    def everywhere(probabilities: np.ndarray) -> Any:
        return jnp.broadcast_to(
            jnp.log(jnp.asarray(probabilities)), (NUM_ROWS, *probabilities.shape)
        )

    drafts = jnp.stack([draw(draft, i, DRAFT_NOISE) for i in range(NUM_DRAFTS)], axis=1)
    sampled = jnp.stack([draw(target, i, 0) for i in range(NUM_DRAFTS + 1)], axis=1)
    verify = jax.jit(after_rejection)
    drafted = Drafts(drafts, jnp.full(NUM_ROWS, num_drafts), everywhere(draft[:NUM_DRAFTS]))
    tokens = verify(drafted, everywhere(target), sampled, positions, seeds, choices)
    is_right = np.asarray(tokens[:, :NUM_DRAFTS] == drafts) & (np.arange(NUM_DRAFTS) < num_drafts)
    return np.asarray(tokens), 1 + np.cumprod(is_right, axis=1).sum(axis=1)


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
@pytest.mark.parametrize(
    ("target", "draft"),
    [
        (distributions(1, 1.0), distributions(2, 1.0)),
        (distributions(3, 2.0), distributions(4, 0.2)),
        (distributions(5, 0.5, zeros=2), distributions(6, 1.0)),
        (distributions(7, 1.0), distributions(8, 1.0, zeros=3)),
        (distributions(9, 1.0), distributions(9, 1.0)),
    ],
)
def test_tokens_are_distributed_as_the_targets(
    target: np.ndarray, draft: np.ndarray, num_drafts: int
) -> None:
    """Here neither depends on the text, so that each token's distribution is known."""
    tokens, num_new = tokens_of(target, draft, num_drafts)
    for number in range(num_drafts + 1):
        found = tokens[num_new > number, number]
        counts = np.bincount(found, minlength=VOCAB_SIZE)
        assert g_test(counts, target[number]) > 1e-3, (number, counts / counts.sum())
    for number in range(num_drafts):
        # Acceptance is what the two have in common (Leviathan et al. 2023, corollary 3.6).
        reached = (num_new > number).sum()
        common = np.minimum(target[number], draft[number]).sum()
        share = (num_new > number + 1).sum() / reached
        assert abs(share - common) < 4 * np.sqrt(common * (1 - common) / reached) + 1e-9


def test_the_test_would_notice() -> None:
    """The draft's own distribution, and the target's with a token exchanged, are told apart."""
    target, draft = distributions(1, 1.0), distributions(2, 1.0)
    tokens, _ = tokens_of(target, draft, 0)
    counts = np.bincount(tokens[:, 0], minlength=VOCAB_SIZE)
    assert g_test(counts, draft[0]) < 1e-6
    assert g_test(counts, 0.97 * target[0] + 0.03 / VOCAB_SIZE) < 1e-3


def rejecting(**changes: Any) -> Engine:
    """A draft that shares the target's first layer: near it, not equal."""
    values = {"num_drafts": 3, "verify": "rejection", "adapt_drafts": False, "draft": "layers"}
    config = tiny_config(**(values | {"num_draft_layers": 1} | changes))
    draft = DraftModel(tiny_model(), CPU_DTYPES) if config.draft == "model" else None
    engine = Engine(tiny_spec(config, draft=draft))
    engine.compile(shapes=few_shapes(engine))
    own, other = (random_parameters(tiny_model(), seed) for seed in (0, 5))
    near = jax.tree.map(lambda x, y: x + 0.2 * y, own, other) if draft else None
    engine.start(jax.device_put(own), jax.device_put(near))
    return engine


@functools.cache
def engine_of(draft: str) -> Engine:
    """Compiled once for this file."""
    if draft == "layers":
        return rejecting()
    return rejecting(draft="model", num_draft_layers=0, max_steps_per_call=2)


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 0.7, "top_p": 0.7, "repetition_penalty": 1.3},
    {"temperature": 1.3, "min_p": 0.2, "logit_bias": ((5, 3.0), (9, 3.5))},
]


@pytest.mark.parametrize(
    "draft", thorough_beyond(["layers"], ["layers", "model"], "more ways to draft")
)
@pytest.mark.parametrize(
    "sampling", thorough_beyond(SAMPLINGS[:1], SAMPLINGS, "more ways to draft")
)
def test_a_models_texts_are_distributed_as_without_drafts(
    draft: str, sampling: dict[str, Any]
) -> None:
    """Second and third tokens of many seeds, with the target alone and with drafts."""
    prompt = (3, 14, 15, 92, 65, 35)
    num_seeds = 400

    def requests(first_seed: int) -> list[Request]:
        return [
            Request(
                str(seed),
                prompt,
                max_tokens=4,
                sampling=SamplingParams(seed=seed, **sampling),
                ignore_eos=True,
            )
            for seed in range(first_seed, first_seed + num_seeds)
        ]

    engine = engine_of(draft)
    drafted = run_all(engine, requests(0))
    assert engine.stats.num_drafted_tokens > engine.stats.num_accepted_tokens > 0
    plain = run_all(shared_engine(), requests(10_000))
    for number in (1, 2, 3):
        ours, theirs = (Counter(t[number] for t in run.values()) for run in (drafted, plain))
        assert two_samples(ours, theirs) > 1e-3, (number, ours, theirs)


def two_samples(ours: Counter[int], theirs: Counter[int]) -> float:
    """The probability of two samples as different as these from one distribution."""
    # Rare tokens together: chi-squared needs some of each.
    common = [token for token, count in (ours + theirs).items() if count >= 10]
    table = np.array(
        [
            [run[token] for token in common] + [run.total() - sum(run[t] for t in common)]
            for run in (ours, theirs)
        ],
        float,
    )
    table = table[:, table.sum(axis=0) > 0]
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    terms = np.where(table > 0, table * np.log(np.maximum(table, 1) / expected), 0)
    return float(chi2.sf(2 * terms.sum(), table.shape[1] - 1)) if table.shape[1] > 1 else 1.0


def test_greedy_tokens_are_those_of_plain_decoding() -> None:
    engine = engine_of("layers")
    requests = [Request(str(i), (i, 2 * i, 7), max_tokens=30, ignore_eos=True) for i in range(1, 9)]
    assert run_all(engine, requests) == run_all(shared_engine(), requests)
    assert engine.stats.num_accepted_tokens > 0
    again = [dataclasses.replace(r, request_id=f"{r.request_id}+") for r in requests]
    assert len(run_all(engine, again)) == 8
