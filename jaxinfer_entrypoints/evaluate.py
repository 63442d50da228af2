"""Perplexity of a text under a model. ``python scripts/evaluate.py --help``."""

from jaxinfer_entrypoints.entry import STARTED, run_main  # before all others: see there

# isort: split

import argparse
import json
import math
import sys
import time

import numpy as np
from tqdm import tqdm

from checkpoints.stored import QUANTIZATIONS
from jaxinfer.request import Request
from jaxinfer_entrypoints.benchmarks.measuring import describe
from jaxinfer_entrypoints.benchmarks.weight_formats import KV_FORMATS, compare_formats, format_table
from jaxinfer_entrypoints.command_line.engine import add_engine_options, load_options
from jaxinfer_entrypoints.inputs.text_file import read_text
from jaxinfer_entrypoints.llm import LLM
from jaxinfer_entrypoints.loading.assembly import LoadedModel, largest_shape
from jaxinfer_entrypoints.loading.phases import Phases


def main() -> None:
    """Entry point ``jaxinfer-evaluate``."""
    run_main(evaluate)


def evaluate() -> None:
    """Prints tokens, mean negative log-likelihood (nats a predicted token) and perplexity."""
    options = parse_arguments()
    text = read_text(options.text)
    phases = Phases(STARTED, quiet=options.json or options.quiet)
    phases.add("import", time.perf_counter() - STARTED)
    with LLM.load(load_options(options), phases, largest_shape) as llm:
        print_figures(llm.loaded, text, options)


def print_figures(loaded: LoadedModel, text: str, options: argparse.Namespace) -> None:
    """Scores the text and prints what was found, of one format or of several side by side."""
    token_ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    if options.max_tokens is not None:
        token_ids = token_ids[: options.max_tokens]
    if len(token_ids) < 2:
        raise ValueError(f"the text has {len(token_ids)} tokens; at least 2 are needed")
    if options.formats:
        rows = compare_formats(loaded, options.formats, token_ids)
        about = {"text_tokens": len(token_ids), **describe(loaded)}
        print(json.dumps({**about, "formats": rows}) if options.json else format_table(rows))
        return
    begun = time.perf_counter()
    losses = window_losses(loaded, token_ids, options.quiet)
    result = {
        "model": loaded.name,
        "tokens": len(token_ids),
        "predicted_tokens": len(losses),
        "nll": float(losses.mean()),
        "perplexity": math.exp(float(losses.mean())),
        "window": loaded.spec.config.max_model_len - 1,
        "seconds": round(time.perf_counter() - begun, 3),
    }
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<17} {value}")


def window_losses(loaded: LoadedModel, token_ids: list[int], quiet: bool = False) -> np.ndarray:
    """Nats of every predicted token, in windows of max_model_len - 1 that do not overlap.

    The windows are prompts like any other, of which log-probabilities are wanted. The first token
    of a window is not predicted; a rest of a single token is left out.
    """
    size = loaded.spec.config.max_model_len - 1  # and one token that is generated
    starts = range(0, len(token_ids) - 1, size)
    for start in starts:
        window = tuple(token_ids[start : start + size])
        loaded.engine.add(Request(str(start), window, max_tokens=1, prompt_logprobs=0))
    losses: dict[str, list[float]] = {}
    disable = True if quiet else None
    with tqdm(
        total=len(starts), desc="windows", file=sys.stderr, disable=disable, leave=False
    ) as bar:
        while loaded.engine.has_unfinished:
            for output in loaded.engine.step():
                scored = output.prompt_logprobs[1:]
                losses[output.request_id] = [-entry.logprob for entry in scored if entry]
                bar.update()
    return np.concatenate([losses[str(start)] for start in starts])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a model's perplexity on a text.")
    parser.add_argument("--text", required=True, help="a UTF-8 file")
    parser.add_argument("--max-tokens", type=int, help="only the text's first tokens")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=[*QUANTIZATIONS[1:], *KV_FORMATS],
        metavar="FORMAT",
        help="beside the plain model these, as for --quantize, or kv-int8 and kv-fp8 as for "
        "--kv-dtype: bytes of weights, losses, divergence from the plain logits, and decoded "
        "tokens a second",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_engine_options(parser)
    options = parser.parse_args()
    if options.formats and (options.quantize not in (None, "none") or options.kv_dtype != "auto"):
        parser.error("--formats compares with the plain model: leave --quantize, --kv-dtype out")
    if options.max_tokens is not None and options.max_tokens < 2:
        parser.error(f"--max-tokens must be at least 2, got {options.max_tokens}")
    return options
