"""``bench.py offline``: random prompts straight into the engine."""

from dataclasses import dataclass
from typing import Any

from jaxinfer_entrypoints.benchmarks.measuring import (
    Measured,
    describe,
    latencies,
    measure,
    random_prompts,
    requests_of,
)
from jaxinfer_entrypoints.benchmarks.ranges import check_range
from jaxinfer_entrypoints.loading.assembly import LoadedModel

MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class Options:
    """Sizes in tokens. Raises ``ValueError`` for those out of range."""

    prompt_len: int = 128
    output_len: int = 64
    num_prompts: int = 16

    def __post_init__(self) -> None:
        for name in ("prompt_len", "output_len", "num_prompts"):
            check_range(name, getattr(self, name), 1, MAX_SIZE)


def run(loaded: LoadedModel, options: Options) -> dict[str, Any]:
    """The figures of one run; greedy, through end-of-sequence tokens."""
    length = options.prompt_len + options.output_len
    if length > loaded.spec.config.max_model_len:
        raise ValueError(
            f"--prompt-len {options.prompt_len} plus --output-len {options.output_len} is more "
            f"than max_model_len ({loaded.spec.config.max_model_len})"
        )
    lengths = [options.prompt_len] * options.num_prompts
    # Other prompts each time, so that none is found in the prefix cache.
    sets = [random_prompts(loaded.spec.model.num_tokens, lengths, seed) for seed in range(3)]
    # Each program once, so that nothing measured is a first time.
    measure(loaded.engine, requests_of(sets[0][:1], 2), "warm up")
    prefill = measure(loaded.engine, requests_of(sets[1], 1), "prefill")
    whole = measure(loaded.engine, requests_of(sets[2], options.output_len), "whole")
    return describe(loaded) | {
        "prompt_len": options.prompt_len,
        "output_len": options.output_len,
        "num_prompts": options.num_prompts,
        "max_num_seqs": loaded.spec.config.max_num_seqs,
        **summarize(prefill, whole, sum(lengths)),
    }


def summarize(prefill: Measured, whole: Measured, num_prompt_tokens: int) -> dict[str, Any]:
    """Rates in tokens per second and latencies in milliseconds.

    Prefill is a run of its own with one output token; decode counts the calls of the whole run
    that compute no prompt token; total is prompt and output tokens over the whole run.
    """
    decode = whole.decode_tokens / whole.decode_seconds if whole.decode_tokens else None
    total = num_prompt_tokens + whole.num_output_tokens
    return {
        "prefill_tokens_per_second": round(num_prompt_tokens / prefill.seconds, 2),
        "decode_tokens_per_second": decode and round(decode, 2),
        "total_tokens_per_second": round(total / whole.seconds, 2),
        "output_tokens_per_second": round(whole.num_output_tokens / whole.seconds, 2),
        **latencies(whole),
        "seconds": round(whole.seconds, 3),
    }
