"""``bench.py host``: the host's time in a step by phase, and whether the device hides it."""

import time
from dataclasses import dataclass
from typing import Any

from jaxinfer.engine import Engine
from jaxinfer.request import SAMPLING_OPTIONS, SamplingParams
from jaxinfer_entrypoints.benchmarks.measuring import describe, measure, random_prompts, requests_of
from jaxinfer_entrypoints.benchmarks.ranges import check_range
from jaxinfer_entrypoints.benchmarks.scheduler import scheduler_times
from jaxinfer_entrypoints.loading.assembly import LoadedModel, largest_shape, new_engine
from serving.text.tokenizer import Detokenizer

EXAMPLES: dict[str, Any] = {option.name: option.example for option in SAMPLING_OPTIONS}
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"sampling": SamplingParams(temperature=1.0)},
    "all features": {
        "sampling": SamplingParams(**EXAMPLES, logit_bias=((5, 1.0), (6, -1.0))),
        "min_tokens": 24,
        "stop_token_ids": (0,),
        "logprobs": 20,
    },
}
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "synchronous": {"steps_ahead": 0, "max_steps_per_call": 1},
    "asynchronous": {"steps_ahead": 1, "max_steps_per_call": 1},
    "asynchronous, 4 steps a call": {"steps_ahead": 1, "max_steps_per_call": 4},
}
PHASES = ("schedule", "pack", "dispatch", "convert", "update")


@dataclass(frozen=True)
class Options:
    """Steps to measure. Raises ``ValueError`` for too few or too many."""

    num_steps: int = 128

    def __post_init__(self) -> None:
        check_range("num_steps", self.num_steps, 2, 4096)


def run(loaded: LoadedModel, options: Options) -> dict[str, Any]:
    """Milliseconds a decode step, all slots in use: waiting for each, ahead, and several a call."""
    figures: dict[str, Any] = describe(loaded) | {"num_seqs": loaded.spec.config.max_num_seqs}
    shapes = [*largest_shape(loaded.engine)]
    shapes += [shape for shape in loaded.engine.shapes if not shape.num_tiles]
    for name, changes in ARRANGEMENTS.items():
        engine = new_engine(loaded, shapes, **changes)
        lengths = [32] * loaded.spec.config.max_num_seqs
        prompts = random_prompts(loaded.spec.model.num_tokens, lengths)
        measure(engine, requests_of(prompts, 4))
        before, cpu_before = engine.host_seconds, engine.host_cpu_seconds
        # The prompts are found in the prefix cache, so that nearly all steps are decodes.
        measured = measure(engine, requests_of(prompts, options.num_steps), name)
        after, cpu_after = engine.host_seconds, engine.host_cpu_seconds
        num_steps = options.num_steps
        figures[name] = {
            f"{phase}_ms": round(1e3 * (after[phase] - before[phase]) / num_steps, 4)
            for phase in (*PHASES, "wait")
        }
        host = sum(figures[name][f"{phase}_ms"] for phase in PHASES)
        cpu = sum(cpu_after[phase] - cpu_before[phase] for phase in PHASES)
        dispatch = cpu_after["dispatch"] - cpu_before["dispatch"]
        detokenize = detokenize_ms(loaded, measured.token_ids)
        figures[name] |= {
            "detokenize_ms": detokenize,
            "host_ms": round(host + detokenize, 4),
            "host_cpu_ms": round(1e3 * cpu / num_steps + detokenize, 4),
            "dispatch_cpu_ms": round(1e3 * dispatch / num_steps, 4),
            "calls": int(after["read"] - before["read"]),
            "step_ms": round(1e3 * measured.seconds / num_steps, 4),
            "tokens_per_second": round(measured.num_output_tokens / measured.seconds, 2),
        }
        if changes == ARRANGEMENTS["asynchronous"]:
            figures["decode_step_ms"] = feature_times(loaded, engine)
        del engine
    return figures | {"scheduler": [scheduler_times(num_running) for num_running in (16, 64)]}


def feature_times(loaded: LoadedModel, engine: Engine) -> dict[str, float]:
    """Milliseconds of a decode step, all slots in use, by what the requests ask for."""
    prompts = random_prompts(loaded.spec.model.num_tokens, [32] * engine.spec.config.max_num_seqs)
    times: dict[str, list[float]] = {name: [] for name in FEATURES}
    for _ in range(3):  # in turns, so that a drift of the machine meets all
        for name, fields in FEATURES.items():
            measured = measure(engine, requests_of(prompts, 24, **fields))
            num_steps = measured.decode_tokens / len(prompts)
            times[name].append(1e3 * measured.decode_seconds / num_steps)
    return {name: round(sorted(values)[1], 3) for name, values in times.items()}


def detokenize_ms(loaded: LoadedModel, token_ids: dict[str, list[int]]) -> float:
    """Milliseconds a step to turn one token of every sequence into text."""
    detokenizers = {name: Detokenizer(loaded.tokenizer) for name in token_ids}
    num_steps = min(len(tokens) for tokens in token_ids.values())
    begun = time.perf_counter()
    for step in range(num_steps):
        for name, tokens in token_ids.items():
            detokenizers[name].add(tokens[step : step + 1])
    return round(1e3 * (time.perf_counter() - begun) / num_steps, 4)
