"""Our own engine, measured as the peers are: see runner_protocol.py."""

import argparse
import functools
import gc
import sys
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[3]))  # the packages

from runner_protocol import Measure, random_ids, run_peer

from jaxinfer.batch import MIN_DECODE_ROWS, BatchShape, padded_decodes
from jaxinfer.engine import Engine
from jaxinfer_entrypoints.benchmarks.measuring import requests_of
from jaxinfer_entrypoints.llm import LLM
from jaxinfer_entrypoints.loading.assembly import LoadedModel, largest_shape, new_engine
from jaxinfer_entrypoints.loading.options import LoadOptions

# More output tokens than are counted: prompts of a batch are computed a few in a call, and all
# sequences must run until the last step that is timed.
SPARE_TOKENS = 64


def main() -> None:
    """Answers until nothing more is asked, then frees the devices' memory."""
    with ExitStack() as opened:
        run_peer(functools.partial(start, opened), add_options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The mode of the engine."""
    parser.add_argument("--fast", action="store_true", help="without batch invariance")


def start(opened: ExitStack, options: argparse.Namespace) -> tuple[dict[str, Any], Measure]:
    """Loads the model once, closed with ``opened``; makes an engine for each number of slots."""
    wanted = LoadOptions(
        model=options.model,
        device="cpu",
        max_num_seqs=MIN_DECODE_ROWS,
        prefix_cache=False,
        batch_invariant=not options.fast,
    )
    loaded = opened.enter_context(LLM.load(wanted, pick_shapes=largest_shape)).loaded
    engines: dict[int, Engine] = {}

    def measure(point: dict[str, Any]) -> float:
        rows = padded_decodes(point["batch"])
        if rows not in engines:
            engines.clear()  # one KV cache at a time
            gc.collect()
            engines[rows] = make_engine(loaded, rows)
        return rate(engines[rows], point)

    mode = "rows may depend on their batch" if options.fast else "the same tokens in every batch"
    description = {
        "weights": f"{loaded.spec.dtypes.weights}, expanded from the GGUF",
        "activations": loaded.spec.dtypes.activations,
        "timed": f"the whole engine, greedy; {mode}",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    }
    return description, measure


def make_engine(loaded: LoadedModel, rows: int) -> Engine:
    """With so many slots, and so many rows in every call, as who serves so many would have it."""
    shapes = [BatchShape(rows, tiles) for tiles in (0, *loaded.spec.config.tile_counts)]
    return new_engine(loaded, shapes, max_num_seqs=rows)


def rate(engine: Engine, point: dict[str, Any]) -> float:
    """Tokens per second of one prefill, or of the decode steps in which all sequences run."""
    batch, steps = point["batch"], point["steps"]
    prompts = [tuple(ids) for ids in random_ids(batch, point["context"])]
    if point["kind"] == "prefill":
        begun = time.perf_counter()
        finish(engine, requests_of(prompts, 1))
        return batch * point["context"] / (time.perf_counter() - begun)
    requests = requests_of(prompts, steps + SPARE_TOKENS)
    for request in requests:
        engine.add(request)
    waiting = {request.request_id for request in requests}
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.token_ids}
    # The next call runs already, and it and all later ones are decodes of every sequence.
    begun, num_tokens = time.perf_counter(), 0
    while num_tokens < batch * steps:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    seconds = time.perf_counter() - begun
    for request in requests:
        engine.abort(request.request_id)
    finish(engine, [])
    return num_tokens / seconds


def finish(engine: Engine, requests: list[Any]) -> None:
    """Steps until nothing is left to do."""
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        engine.step()


if __name__ == "__main__":
    main()
