"""``bench.py speculation``: decoding with drafts against decoding without, and how often they hit.

``--draft`` says who drafts (default: ngram). With ``--simulate`` drafts are right as often as
asked for, which shows what the program itself gains from acceptance. With a temperature both rules
of acceptance are measured on the same prompts.
"""

import dataclasses
import inspect
import math
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import page_pool
from jaxinfer.batch import batch_shapes
from jaxinfer.config import VERIFICATIONS
from jaxinfer.drafters import drafter_traits
from jaxinfer.engine import Engine
from jaxinfer.request import Request, SamplingParams
from jaxinfer.speculation import ngram
from jaxinfer_entrypoints.benchmarks.measuring import Measured, describe, measure
from jaxinfer_entrypoints.benchmarks.ranges import check_range
from jaxinfer_entrypoints.benchmarks.serve.plots import check_plot
from jaxinfer_entrypoints.loading.assembly import LoadedModel, new_engine

MAX_MODEL_LEN = 2048
# Of each text, so that prompt and answer fit.
MAX_TEXT = 2400


def prompt_texts() -> dict[str, str]:
    """Work in which much of a text comes again, and work in which little does."""
    code = inspect.getsource(page_pool)[:MAX_TEXT]
    manual = pydoc_data.topics.topics["typesmethods"] + pydoc_data.topics.topics["lambda"]
    return {
        "edit code": "Rename the method allocate to take in this file and print the whole file "
        f"again:\n```python\n{code}\n```\n",
        "summarise": "Summarise this text in a few sentences, quoting the important parts:\n"
        f"{manual[:MAX_TEXT]}\n",
        "list": "List the numbers from 1 to 60, one on each line, in words.",
        "story": "Write a story about a lighthouse keeper who finds a strange letter.",
    }


@dataclass(frozen=True)
class Options:
    """Measurements to take. Raises ``ValueError`` for what cannot be.

    ``batch``: sequences at once, one row each. ``simulate``: percentages of drafts that are right.
    """

    batch: Sequence[int] = (1,)
    output_len: int = 128
    temperature: float = 0.0
    simulate: Sequence[int] = ()
    plot: Path | None = None

    def __post_init__(self) -> None:
        check_range("batch", self.batch, 1, 64)
        check_range("output_len", self.output_len, 8, 1024)
        check_range("simulate", self.simulate, 0, 100)
        if self.plot:
            if not self.simulate:
                raise ValueError("--plot draws what --simulate measures")
            check_plot(self.plot)


def run(loaded: LoadedModel, options: Options) -> dict[str, Any]:
    """A row for each number of sequences and kind of text."""
    draft = loaded.spec.config.draft or "ngram"
    # Greedy decoding accepts by both rules the same.
    rules = VERIFICATIONS if options.temperature > 0 else (loaded.spec.config.verify,)
    rows = []
    for size in options.batch:
        plain = engine_for(loaded, size, draft=None)
        for rule in rules:
            drafting = engine_for(loaded, size, draft=draft, verify=rule)
            for name, text in prompt_texts().items():
                requests = requests_for(loaded, text, size, options.output_len, options.temperature)
                about = {"batch": size, "text": name, "verify": rule}
                rows.append(about | compared(plain, drafting, requests))
            del drafting
        del plain
    figures = describe(loaded) | {
        "draft": loaded.options.draft or draft,
        "draft_dtype": loaded.spec.draft.dtypes.matrices if loaded.spec.draft else None,
        "num_drafts": loaded.spec.config.num_drafts,
        "verify": rules,
        "temperature": options.temperature,
        "output_len": options.output_len,
        "rows": rows,
        "pays_up_to": pays_up_to(rows),
        "simulated": [],
    }
    if options.simulate:
        figures["simulated"] = simulated(loaded, options)
    if options.plot:
        draw(figures, options.plot)
    return figures


def pays_up_to(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """For each text the largest number of sequences, of those measured, that drafts made faster.

    0 where they never did.
    """
    paying = {str(row["text"]): 0 for row in rows}
    for row in rows:
        if row["ratio"] > 1:
            paying[row["text"]] = max(paying[row["text"]], row["batch"])
    return paying


def engine_for(loaded: LoadedModel, size: int, **changes: Any) -> Engine:
    """An engine with the programs that ``size`` sequences need."""
    values = {
        "max_num_seqs": size,
        "max_draft_seqs": size,
        "max_model_len": min(MAX_MODEL_LEN, loaded.spec.config.max_model_len),
        "prefix_cache": False,
    } | changes
    if not drafter_traits(values["draft"]).takes_layers:
        values["num_draft_layers"] = 0
    # Steps of decodes alone in all sizes, and the largest plain step for prompts.
    shapes = batch_shapes(dataclasses.replace(loaded.spec.config, **values))
    alone = [shape for shape in shapes if not shape.num_tiles]
    largest = [shape for shape in shapes if not shape.num_drafts][-1]
    engine = new_engine(loaded, [*alone, largest], **values)
    warm = [Request(str(i), (1, 2, 3) * 30, max_tokens=12, ignore_eos=True) for i in range(size)]
    measure(engine, warm)
    return engine


def requests_for(
    loaded: LoadedModel, text: str, size: int, output_len: int, temperature: float = 0.0
) -> list[Request]:
    """The same task ``size`` times; with a temperature every answer is another.

    As a chat where the model has a template; what does not fit is cut off at the beginning.
    """
    tokenizer = loaded.tokenizer
    if tokenizer.has_chat_template:
        token_ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    else:
        token_ids = tokenizer.encode(text)
    room = min(MAX_MODEL_LEN, loaded.spec.config.max_model_len) - output_len
    if room < 1:
        raise ValueError(
            f"--output-len {output_len} leaves no room for a prompt in "
            f"{room + output_len} tokens: lower it"
        )
    prompt = tuple(token_ids[-room:]) or (0,)
    return [
        Request(
            str(number),
            prompt,
            max_tokens=output_len,
            sampling=SamplingParams(temperature=temperature, seed=number),
            ignore_eos=True,
        )
        for number in range(size)
    ]


def compared(plain: Engine, drafting: Engine, requests: list[Request]) -> dict[str, Any]:
    """Both sides, one after the other, and whether they gave the same tokens.

    Rejection keeps the distribution of sampled tokens, not the tokens.
    """
    without, with_drafts = measure(plain, requests), measure(drafting, requests)
    drafted, accepted = drafts_of(with_drafts)
    before, after = (m.decode_tokens / m.decode_seconds for m in (without, with_drafts))
    is_same = with_drafts.token_ids == without.token_ids
    sampled = requests[0].sampling.temperature > 0
    return {
        "plain_tokens_per_second": round(before, 2),
        "tokens_per_second": round(after, 2),
        "ratio": round(after / before, 3),
        "acceptance_rate": round(accepted / drafted, 4) if drafted else None,
        "drafted_tokens": drafted,
        "tokens_equal": None if sampled and drafting.spec.config.verify == "rejection" else is_same,
    }


def drafts_of(measured: Measured) -> tuple[int, int]:
    """Tokens drafted, and of these right."""
    last = measured.last_outputs.values()
    return sum(o.num_drafted_tokens for o in last), sum(o.num_accepted_tokens for o in last)


def simulated(loaded: LoadedModel, options: Options) -> list[dict[str, Any]]:
    """One sequence, whose tokens are known beforehand and drafted with the accuracy asked for."""
    plain = engine_for(loaded, 1, draft=None)
    text = prompt_texts()["story"]
    (request,) = requests_for(loaded, text, 1, options.output_len, options.temperature)
    answer = measure(plain, [request]).token_ids["0"]
    points = []
    for percent in options.simulate:
        known = [*request.prompt_token_ids, *answer]
        with _drafting(known, percent / 100, loaded.spec.model.vocab_size):
            drafting = engine_for(loaded, 1, draft="ngram", adapt_drafts=False)
        found = compared(plain, drafting, [request])
        num_drafts = loaded.spec.config.num_drafts
        expected = sum((percent / 100) ** n for n in range(num_drafts + 1))
        points.append({"percent": percent, "tokens_a_step": round(expected, 3), **found})
        del drafting
    return points


@contextmanager
def _drafting(known: Sequence[int], accuracy: float, vocab_size: int) -> Iterator[None]:
    """Programs that are compiled meanwhile draft ``known`` tokens, each right with ``accuracy``."""
    random = np.random.default_rng(0)
    wrong = (np.asarray(known) + 1) % vocab_size
    table = np.where(random.random(len(known)) < accuracy, known, wrong).astype(np.int32)

    def propose(tokens: jax.Array, ends: jax.Array, num_drafts: int) -> tuple[jax.Array, ...]:
        at = ends[:, None] + jnp.arange(num_drafts)[None, :]
        drafts = jnp.asarray(table).at[at].get(mode="fill", fill_value=0)
        return drafts, jnp.full(ends.shape, num_drafts, jnp.int32)

    original = ngram.propose_ngrams
    ngram.propose_ngrams = propose
    jax.clear_caches()  # or a program traced before would be taken for this one
    try:
        yield
    finally:
        ngram.propose_ngrams = original
        jax.clear_caches()


def table(figures: dict[str, Any]) -> str:
    """The rows as text."""
    title = f"{figures['model']} in {figures['dtype']}, {figures['num_drafts']} drafts by "
    lines = [
        f"{title}{figures['draft']}",
        f"{'batch':>5} {'text':<12} {'plain':>9} {'drafts':>9} tok/s {'ratio':>6} "
        f"{'right':>7}  {'verify':<9}  tokens",
    ]
    equal = {True: "equal", False: "DIFFER", None: "other draws"}
    for row in [*figures["rows"], *figures["simulated"]]:
        right = row["acceptance_rate"]
        name = row.get("text") or f"{row['percent']} % right"
        lines.append(
            f"{row.get('batch', 1):>5} {name:<12} {row['plain_tokens_per_second']:>9.1f} "
            f"{row['tokens_per_second']:>9.1f}       {row['ratio']:>5.2f}x "
            f"{'-' if right is None else f'{100 * right:.0f} %':>7}  "
            f"{row.get('verify', 'exact'):<9}  {equal[row['tokens_equal']]}"
        )
    sizes = sorted({row["batch"] for row in figures["rows"]})
    if len(sizes) > 1:
        points = ", ".join(f"{name} {most}" for name, most in figures["pays_up_to"].items())
        lines.append(f"of {sizes} sequences drafts pay up to: {points}")
    return "\n".join(lines)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Speed against acceptance, beside the tokens a step that it would bring were drafts free."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    points = figures["simulated"]
    percents = [point["percent"] for point in points]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(percents, [point["ratio"] for point in points], "o-", label="measured")
    most = [point["tokens_a_step"] for point in points]
    axes.plot(percents, most, "--", label="tokens a step, were drafts free")
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_xlabel("drafts that are right, % each")
    axes.set_ylabel("decode tok/s, times plain decoding")
    axes.set_ylim(0, math.ceil(max(most)))
    axes.legend()
    names = ("model", "dtype", "device", "date")
    axes.set_title(", ".join(figures[name] for name in names) + f", K = {figures['num_drafts']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
