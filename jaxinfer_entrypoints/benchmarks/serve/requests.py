"""The requests of a run of ``bench.py serve``: from flags and a file. Imports no JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxinfer_entrypoints.benchmarks.serve.arrivals import (
    arrival_times,
    length_range,
    random_lengths,
    random_prompts,
)
from jaxinfer_entrypoints.benchmarks.serve.options import Options
from jaxinfer_entrypoints.inputs.prompt_lines import PromptLine, parse_lines
from serving.client.options import Message, Prompt
from serving.proto.jaxinfer.v1 import inference_pb2 as pb

MAX_PROMPT_TOKENS = 1 << 28  # of all random prompts: 1 GiB
DEFAULT_NUM_PROMPTS = 100


@dataclass(frozen=True)
class Load:
    """The requests of one run: prompts, output lengths and when each is due, in seconds."""

    prompts: Sequence[Prompt | np.ndarray]
    output_lens: Sequence[int]
    arrivals: Sequence[float]


def make_load(
    options: Options,
    lines: Sequence[PromptLine] | None,
    num_prompts: int,
    rate: float,
    info: pb.GetModelInfoResponse,
) -> Load:
    """The same prompts, lengths and gaps, but for their scale, in every run of a seed."""
    random = np.random.default_rng(options.seed)
    ratio = options.random_range_ratio
    longest = length_range(options.random_output_len, ratio)[1]
    if lines is None:
        longest_input = length_range(options.random_input_len, ratio)[1]
        if longest_input + longest > info.max_model_len:
            raise ValueError(
                f"prompts of up to {longest_input} tokens plus outputs of up to {longest} are more "
                f"than the server's max_model_len ({info.max_model_len})"
            )
        if num_prompts * longest_input > MAX_PROMPT_TOKENS:
            raise ValueError(
                f"{num_prompts} prompts of up to {longest_input} tokens are more than "
                f"{MAX_PROMPT_TOKENS} tokens"
            )
        lengths = random_lengths(num_prompts, options.random_input_len, ratio, random)
        prompts: list[Prompt | np.ndarray] = [*random_prompts(lengths, info.vocab_size, random)]
    else:
        prompts = [prompt_of(line) for line in lines[:num_prompts]]
    output_lens = random_lengths(num_prompts, options.random_output_len, ratio, random)
    return Load(prompts, output_lens, arrival_times(num_prompts, rate, options.burstiness, random))


def count_prompts(options: Options, lines: Sequence[PromptLine] | None) -> int:
    """Returns how many requests a run has."""
    if lines is None:
        return options.num_prompts or DEFAULT_NUM_PROMPTS
    if options.num_prompts is not None and options.num_prompts > len(lines):
        raise ValueError(
            f"--num-prompts {options.num_prompts} is more than the {len(lines)} lines of "
            f"{options.prompts}"
        )
    return options.num_prompts or len(lines)


def read_prompts(path: Path) -> list[PromptLine]:
    """The lines of ``--prompts``; errors name the file and the line."""
    with path.open(encoding="utf-8-sig") as file:
        return parse_lines(file, str(path))


def prompt_of(line: PromptLine) -> Prompt:
    """A line of ``--prompts`` as the client takes it."""
    if line.kind == "messages":
        return [Message(message["role"], message["content"]) for message in line.content]
    return line.content
