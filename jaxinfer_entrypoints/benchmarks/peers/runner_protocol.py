"""Talk between ``bench_peers.py`` and a runner: JSON lines over the runner's stdin and stdout.

A runner loads its model, says what it is in one line, and then answers one line a point with the
tokens per second of each repetition, until its stdin ends. Python 3.9 and its standard library are
enough, since the interpreter is the peer's own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from typing import Any

# Measures a point once: a JSON object as in bench_peers.POINTS; returns tokens per second.
Measure = Callable[[dict[str, Any]], float]
# Loads the model; returns what the peer is (weights, versions, notes) and how it measures.
Start = Callable[[argparse.Namespace], tuple[dict[str, Any], Measure]]

# Ids that no vocabulary of the Llama family lacks, and none of its control tokens.
FIRST_TOKEN, NUM_TOKENS = 3, 20_000
WARM_UP_STEPS = 3


def run_peer(
    start: Start, add_options: Callable[[argparse.ArgumentParser], None] | None = None
) -> None:
    """A runner's main program. Failures of a point become one line, and the run goes on."""
    parser = argparse.ArgumentParser(description="Run by bench_peers.py.")
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    if add_options is not None:
        add_options(parser)
    options = parser.parse_args()
    # What libraries print to stdout must not come between the lines.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    random.seed(os.getpid())
    description, measure = start(options)
    print(json.dumps({"ready": description}), file=answers, flush=True)
    for line in sys.stdin:
        point = json.loads(line)
        try:
            # Once for what is compiled, allocated or read for the first time.
            measure({**point, "steps": min(point["steps"], WARM_UP_STEPS)})
            answer = {"rates": [measure(point) for _ in range(point["repetitions"])]}
        except Exception as error:  # any of the peer's own, reported by bench_peers.py
            words = " ".join(str(error).split())[:300]
            answer = {"error": f"{type(error).__name__}: {words}"}
        print(json.dumps(answer), file=answers, flush=True)


def random_ids(batch: int, length: int) -> list[list[int]]:
    """Prompts of random tokens, others each time, so that no cache knows them."""
    last = FIRST_TOKEN + NUM_TOKENS
    return [[random.randrange(FIRST_TOKEN, last) for _ in range(length)] for _ in range(batch)]
