"""``bench.py invariance``: the same requests in many arrangements must give the same tokens."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.batch import batch_shapes
from jaxinfer.engine import Engine
from jaxinfer.request import SAMPLING_OPTIONS, Request, SamplingParams
from jaxinfer_entrypoints.benchmarks.measuring import Measured, describe, measure, random_prompts
from jaxinfer_entrypoints.benchmarks.ranges import check_range
from jaxinfer_entrypoints.loading.assembly import LoadedModel, new_engine


@dataclass(frozen=True)
class Options:
    """Requests, their new tokens, and if the promise's ``cost`` is measured too.

    Raises ``ValueError`` for sizes out of range.
    """

    num_prompts: int = 200
    output_len: int = 16
    cost: bool = True

    def __post_init__(self) -> None:
        check_range("num_prompts", self.num_prompts, 1, 10_000)
        check_range("output_len", self.output_len, 1, 512)


def run(loaded: LoadedModel, options: Options) -> dict[str, Any]:
    """Counts the requests that gave the tokens they give alone, by arrangement; and the cost."""
    longest = min(768, loaded.spec.config.max_model_len)
    requests = make_requests(
        loaded.spec.model.num_tokens, longest, options.num_prompts, options.output_len
    )
    alone: dict[str, list[int]] = {}
    results = {}
    for name, engine, batches in arrangements(loaded, requests, longest):
        measured = [measure(engine, batch, name if len(batch) > 1 else "") for batch in batches]
        token_ids = {key: ids for run in measured for key, ids in run.token_ids.items()}
        alone = alone or token_ids
        equal = sum(ids == alone[key] for key, ids in token_ids.items())
        results[name] = {
            "equal": equal,
            "requests": len(requests),
            "seconds": round(sum(run.seconds for run in measured), 3),
            "preemptions": engine.stats.num_preemptions,
            "cached_tokens": engine.stats.num_cached_tokens,
            "drafted_tokens": engine.stats.num_drafted_tokens,
            "accepted_tokens": engine.stats.num_accepted_tokens,
        }
        del engine
    figures = describe(loaded) | {"arrangements": results}
    return figures | {"cost": cost(loaded) if options.cost else {}}


def table(figures: dict[str, Any]) -> str:
    """The arrangements as text."""
    lines = [
        f"{'arrangement':<30} {'equal':>9} {'preemptions':>12} {'cached':>8} {'drafts right':>14} "
        f"{'seconds':>8}"
    ]
    for name, row in figures["arrangements"].items():
        equal = f"{row['equal']}/{row['requests']}"
        lines.append(
            f"{name:<30} {equal:>9} {row['preemptions']:>12} {row['cached_tokens']:>8} "
            f"{row['accepted_tokens']:>6}/{row['drafted_tokens']:<7} {row['seconds']:>8.1f}"
        )
    for name, row in figures["cost"].items():
        lines.append(
            f"{name}: {row['invariant']} with the promise, {row['fast']} without it "
            f"({row['ratio']:.2f}x)"
        )
    return "\n".join(lines)


def make_requests(vocab_size: int, longest: int, count: int, output_len: int) -> list[Request]:
    """Greedy and seeded requests of at most ``longest`` tokens; three in four share a beginning."""
    random = np.random.default_rng(0)
    lengths = random.integers(4, max(5, longest // 5), count)
    prompts = random_prompts(vocab_size, lengths.tolist())
    # Greedy, and three that share all options between them, each at a temperature of its own.
    examples: dict[str, Any] = {option.name: option.example for option in SAMPLING_OPTIONS}
    del examples["temperature"]
    samplings = [SamplingParams()]
    for number, temperature in enumerate((1.0, 0.8, 1.1)):
        some = dict(list(examples.items())[number::3])
        samplings.append(SamplingParams(temperature=temperature, **some))
    requests = []
    for number, prompt in enumerate(prompts):
        shared = prompts[number - number % 4] if number % 4 else ()
        sampling = dataclasses.replace(samplings[number % 7 % 4], seed=number)
        requests.append(
            Request(str(number), shared + prompt, output_len, sampling, ignore_eos=True)
        )
    return requests


def arrangements(
    loaded: LoadedModel, requests: list[Request], longest: int
) -> Iterator[tuple[str, Engine, list[list[Request]]]]:
    """(name, engine, batches that are run one after the other); the first is each one alone."""
    sizes: dict[str, Any] = {"max_model_len": longest, "draft": None, "num_draft_layers": 0}
    sizes["max_num_batched_tokens"] = 256
    page_size = loaded.spec.config.page_size
    singles = [[request] for request in requests]
    backwards = [dataclasses.replace(r, priority=int(r.request_id) % 5) for r in requests[::-1]]

    def engine(**changes: Any) -> Engine:
        config = dataclasses.replace(loaded.spec.config, **(sizes | changes))
        # Few programs, of every kind: small and large batches, with and without chunks.
        shapes = batch_shapes(config)
        few = [shape for shape in shapes if shape.num_tiles in (0, 1, shapes[-1].num_tiles)]
        return new_engine(loaded, few, **(sizes | changes))

    yield "alone, no prefix cache", engine(prefix_cache=False), singles
    together = engine(num_pages=loaded.spec.config.num_pages)
    yield "all at once", together, [requests]
    yield "again, from the prefix cache", together, [requests]
    del together
    yield "chunks of 64", engine(max_num_batched_tokens=64, max_num_seqs=5), [requests]
    few = -(-longest // page_size)
    yield "preempted, few pages", engine(num_pages=few), [requests]
    yield "backwards, priorities, 4 steps", engine(max_steps_per_call=4), [backwards]
    drafts: dict[str, Any] = {"num_drafts": 3, "adapt_drafts": False}
    yield "drafts from the text", engine(draft="ngram", **drafts), [requests]
    layers = {
        "draft": "layers",
        "num_draft_layers": max(1, loaded.spec.model.num_hidden_layers // 3),
    }
    tight = engine(**drafts, **layers, num_pages=3 * few, max_steps_per_call=2)
    yield "drafts of the first layers", tight, [backwards]
    del tight
    if loaded.spec.draft:
        yield "drafts of a model", engine(draft="model", **drafts), [requests]


def cost(loaded: LoadedModel) -> dict[str, Any]:
    """Speed with the promise and without it, both in this run."""
    speeds: dict[str, list[float]] = {}
    for batch_invariant in (True, False):
        shapes = loaded.engine.shapes
        few = [shape for shape in shapes if shape.num_tiles in (0, shapes[-1].num_tiles)]
        engine = new_engine(loaded, few, batch_invariant=batch_invariant, prefix_cache=False)
        for size in (1, loaded.spec.config.max_num_seqs):
            prompts = random_prompts(loaded.spec.model.num_tokens, [64] * size)
            requests = [Request(str(i), p, 33, ignore_eos=True) for i, p in enumerate(prompts)]
            measure(engine, requests)
            measured: Measured = measure(engine, requests)
            speed = measured.decode_tokens / measured.decode_seconds
            speeds.setdefault(f"decode tok/s, batch {size}", []).append(speed)
        length = min(512, engine.spec.config.max_model_len // 2)
        prompts = random_prompts(loaded.spec.model.num_tokens, [length] * 4, seed=1)
        measured = measure(engine, [Request(str(i), p, 1) for i, p in enumerate(prompts)])
        speeds.setdefault("prefill tok/s", []).append(4 * length / measured.seconds)
        del engine
    return {
        name: {"invariant": round(ours, 2), "fast": round(fast, 2), "ratio": round(fast / ours, 3)}
        for name, (ours, fast) in speeds.items()
    }
