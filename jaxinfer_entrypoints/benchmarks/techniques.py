"""``bench.py techniques``: each technique against the naive way, same model, same run.

A row has both sides in one unit, their ratio, the claim made for the technique elsewhere, whether
the two sides gave the same tokens, and a note where this machine cannot show the claim.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxinfer.engine import Engine
from jaxinfer.kv_cache import page_bytes
from jaxinfer.request import Request
from jaxinfer_entrypoints.benchmarks import speculation as bench_speculation
from jaxinfer_entrypoints.benchmarks.measuring import (
    Measured,
    describe,
    latencies,
    measure,
    random_prompts,
    requests_of,
)
from jaxinfer_entrypoints.benchmarks.weight_formats import in_format, weight_bytes
from jaxinfer_entrypoints.loading.assembly import LoadedModel, new_engine

# Sizes of every engine here, unless a row says otherwise.
SIZES: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 1280}


@dataclass(frozen=True)
class Row:
    """One comparison; ``ratio`` is ours over naive, or naive over ours where less is better."""

    technique: str
    claim: str
    unit: str
    naive: float
    ours: float
    ratio: float
    tokens_equal: bool | None
    note: str = ""


@dataclass(frozen=True)
class Options:
    """Choice of rows: those whose technique contains ``only``, all for None."""

    only: str | None = None


def run(loaded: LoadedModel, options: Options) -> dict[str, Any]:
    """All rows; each is a generator so that engines are made for the rows that are wanted only."""
    rows: list[Row] = []
    for names, rows_of in TECHNIQUES.items():
        if not options.only or options.only in names:
            rows += rows_of(loaded)
    if not rows:
        raise ValueError(f"--only {options.only!r} matches none of: {'; '.join(TECHNIQUES)}")
    return describe(loaded) | {"rows": [asdict(row) for row in rows]}


def table(figures: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{'technique':<52} {'claim':>8} {'ratio':>7}  {'naive':>9} {'ours':>9} unit, tokens"]
    for row in figures["rows"]:
        equal = {True: "equal", False: "DIFFER", None: "-"}[row["tokens_equal"]]
        lines.append(
            f"{row['technique']:<52} {row['claim']:>8} {row['ratio']:>6.1f}x "
            f"{row['naive']:>9.1f} {row['ours']:>9.1f} {row['unit']}, {equal}"
        )
        if row["note"]:
            lines.append(f"    {row['note']}")
    return "\n".join(lines)


def kv_cache(loaded: LoadedModel) -> Iterator[Row]:
    """Decoding with the cache against computing the whole sequence again for every token."""
    engine = engine_for(loaded, prefix_cache=False)
    for size, count in ((1, 8), (16, 2)):
        prompts = random_prompts(loaded.spec.model.num_tokens, [256] * size)
        ours = measure(engine, requests_of(prompts, 33))
        # Token by token: the prompt and all tokens so far as a new request.
        seconds, tokens = 0.0, [list[int]() for _ in prompts]
        for _ in range(count):
            longer = [(*prompt, *new) for prompt, new in zip(prompts, tokens, strict=True)]
            again = measure(engine, requests_of(longer, 1))
            seconds += again.seconds
            for number, new in enumerate(tokens):
                new += again.token_ids[str(number)]
        yield faster(
            f"KV cache against recomputation, 256 tokens, batch {size}",
            "10-100x",
            "decode tok/s",
            (size * count / seconds, ours.decode_tokens / ours.decode_seconds),
            all(ours.token_ids[str(i)][:count] == new for i, new in enumerate(tokens)),
            "reading the weights bounds a decode of one sequence" if size == 1 else "",
        )


def paging(loaded: LoadedModel) -> Iterator[Row]:
    """Pages as needed against a reserved maximum length, in the same bytes, mixed lengths."""
    random = np.random.default_rng(1)
    page_size, length = loaded.spec.config.page_size, SIZES["max_model_len"]
    prompts = random_prompts(loaded.spec.model.num_tokens, random.integers(32, 640, 24).tolist())
    requests = requests_of(prompts, 32)
    num_pages, reserved = 4 * -(-length // page_size), 4
    paged = engine_for(loaded, num_pages=num_pages, prefix_cache=False)
    ours = measure(paged, requests)
    del paged
    fixed = engine_for(loaded, num_pages=num_pages, prefix_cache=False, max_num_seqs=reserved)
    naive = measure(fixed, requests)
    equal = ours.token_ids == naive.token_ids
    name = "paging against reserved maximum lengths"
    note = f"{num_pages} pages, maximum {length} tokens, prompts of 32 to 639, 32 new tokens"
    yield faster(
        f"{name}: sequences", "2-4x", "at once", (naive.max_running, ours.max_running), equal, note
    )
    yield faster(f"{name}: speed", "-", "output tok/s", (rate(naive), rate(ours)), equal)


def continuous_batching(loaded: LoadedModel) -> Iterator[Row]:
    """Continuous batching against padded static batches and against one request at a time."""
    random = np.random.default_rng(2)
    engine = engine_for(loaded, prefix_cache=False)
    lengths = random.integers(16, 128, 48).tolist()
    max_tokens = random.integers(8, 128, 48).tolist()
    prompts = random_prompts(loaded.spec.model.num_tokens, lengths)
    ours = measure(engine, requests_of(prompts, max_tokens))

    size, seconds = SIZES["max_num_seqs"], 0.0
    for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        longest = max(lengths[part])
        # A static batch pads prompts to its longest, and ends with its longest output.
        padded = [prompt + (0,) * (longest - len(prompt)) for prompt in prompts[part]]
        seconds += measure(engine, requests_of(padded, max_tokens[part])).seconds
    static = sum(max_tokens) / seconds
    few = slice(0, 6)
    alone = [measure(engine, [request]) for request in requests_of(prompts[few], max_tokens[few])]
    equal = all(ids == ours.token_ids[key] for run in alone for key, ids in run.token_ids.items())
    one = sum(max_tokens[few]) / sum(run.seconds for run in alone)
    name = "continuous batching against"
    yield faster(
        f"{name} static padded batches", "2-4x", "output tok/s", (static, rate(ours)), None
    )
    yield faster(
        f"{name} one at a time",
        "10-20x",
        "output tok/s",
        (one, rate(ours)),
        equal,
        "two cores are busy with 16 rows: a batch costs arithmetic here, not only bandwidth",
    )


def prefix_cache(loaded: LoadedModel) -> Iterator[Row]:
    """A shared prompt of 1,000 tokens found in the cache against computed each time."""
    shared, *own = random_prompts(loaded.spec.model.num_tokens, [1000] + [20] * 8)
    requests = requests_of([shared + tokens for tokens in own], 8)
    runs: list[Measured] = []
    for enabled in (False, True):
        engine = engine_for(loaded, prefix_cache=enabled)
        measure(engine, [Request("first", shared, max_tokens=1)])
        runs.append(measure(engine, requests))
        del engine
    naive, ours = runs
    equal = naive.token_ids == ours.token_ids
    name = "prefix cache, 8 prompts sharing 1,000 tokens"
    before, after = latencies(naive)["ttft_ms_p50"], latencies(ours)["ttft_ms_p50"]
    assert before is not None
    assert after is not None
    yield smaller(f"{name}: first token", "-", "ms TTFT p50", (before, after), equal)
    yield smaller(f"{name}: all done", "-", "s", (naive.seconds, ours.seconds), equal)


def asynchronous_steps(loaded: LoadedModel) -> Iterator[Row]:
    """Sending a step before the one before is read, and several steps in one call."""
    prompts = random_prompts(loaded.spec.model.num_tokens, [16] * 16)
    rates: list[float] = []
    runs: list[Measured] = []
    for changes in ({"steps_ahead": 0}, {}, {"max_steps_per_call": 8}):
        engine = engine_for(loaded, prefix_cache=False, **changes)
        measure(engine, requests_of(prompts, 2))
        runs.append(measure(engine, requests_of(prompts, 64)))
        rates.append(runs[-1].decode_tokens / runs[-1].decode_seconds)
        del engine
    waiting, ahead, several = rates
    equal = runs[0].token_ids == runs[1].token_ids == runs[2].token_ids
    note = "a step takes some 80 ms here and the host about 1: there is little to hide"
    unit = "decode tok/s"
    yield faster("asynchronous steps", "-", unit, (waiting, ahead), equal, note)
    yield faster("8 steps in one call against one", "-", unit, (ahead, several), equal)


def quantization(loaded: LoadedModel) -> Iterator[Row]:
    """Matrices in 8 bits against plain ones; ``evaluate.py --formats`` says what they cost."""
    if loaded.spec.dtypes.quantization is not None:
        raise ValueError("quantization is compared with plain weights: leave --quantize out")
    name = "int8"
    small = in_format(loaded, name)
    naive, ours = weight_bytes(loaded.parameters), weight_bytes(small.parameters)
    title = f"{name} against {loaded.spec.dtypes.weights} weights"
    yield smaller(f"{title}, bytes", "4-8x", "MiB", (naive / 2**20, ours / 2**20), None)
    pages = [
        page_bytes(loaded.spec.model, loaded.spec.config.page_size, dtype, loaded.engine.spec.mesh)
        for dtype in ("bfloat16", name)
    ]
    title_pages = f"{name} against bfloat16 KV pages, bytes of a token"
    whole, rounded = (size / loaded.spec.config.page_size / 1024 for size in pages)
    yield smaller(title_pages, "-", "KiB", (whole, rounded), None)
    engines = [
        engine_for(variant, prefix_cache=False, max_num_seqs=32) for variant in (loaded, small)
    ]
    for size in (1, 8, 16, 32):
        requests = requests_of(random_prompts(loaded.spec.model.num_tokens, [32] * size), 33)
        plain, quantized = (measure(engine, requests) for engine in engines)
        before, after = (run.decode_tokens / run.decode_seconds for run in (plain, quantized))
        yield faster(f"{title}, batch {size}", "2-4x", "decode tok/s", (before, after), None)


def speculation(loaded: LoadedModel) -> Iterator[Row]:
    """Drafts from the text against plain decoding; ``bench.py speculation`` has other drafts."""
    texts = bench_speculation.prompt_texts()
    for size, names in ((1, ("edit code", "summarise", "story")), (8, ("edit code",))):
        plain, drafting = (
            bench_speculation.engine_for(loaded, size, draft=who) for who in (None, "ngram")
        )
        for name in names:
            requests = bench_speculation.requests_for(loaded, texts[name], size, 128)
            found = bench_speculation.compared(plain, drafting, requests)
            right = found["acceptance_rate"]
            yield faster(
                f"drafts from the text, {name}, batch {size}",
                "2-3x",
                "decode tok/s",
                (found["plain_tokens_per_second"], found["tokens_per_second"]),
                found["tokens_equal"],
                f"{found['drafted_tokens']} drafts, {100 * right:.0f} % right" if right else "",
            )
        del plain, drafting


TECHNIQUES = {
    "KV cache against recomputation": kv_cache,
    "paging against reserved maximum lengths": paging,
    "continuous batching": continuous_batching,
    "prefix cache": prefix_cache,
    "asynchronous steps": asynchronous_steps,
    "quantization": quantization,
    "speculation": speculation,
}


def engine_for(loaded: LoadedModel, **changes: Any) -> Engine:
    """An engine of this table's sizes that has run a little."""
    engine = new_engine(loaded, **(SIZES | changes))
    for length in (8, 100, 600):
        measure(engine, requests_of(random_prompts(loaded.spec.model.num_tokens, [length], 99), 3))
    return engine


def rate(measured: Measured) -> float:
    """Output tokens per second of a whole run."""
    return measured.num_output_tokens / measured.seconds


def faster(
    technique: str,
    claim: str,
    unit: str,
    sides: tuple[float, float],
    tokens_equal: bool | None,
    note: str = "",
) -> Row:
    """Makes a row in which more is better; ``sides`` are the naive way's and ours."""
    naive, ours = sides
    ratio = round(ours / naive, 3)
    return Row(technique, claim, unit, round(naive, 3), round(ours, 3), ratio, tokens_equal, note)


def smaller(
    technique: str, claim: str, unit: str, sides: tuple[float, float], tokens_equal: bool | None
) -> Row:
    """Makes a row in which less is better; ``sides`` as above."""
    naive, ours = sides
    ratio = round(naive / ours, 3)
    return Row(technique, claim, unit, round(naive, 3), round(ours, 3), ratio, tokens_equal)
