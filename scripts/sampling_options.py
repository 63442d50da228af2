"""Flags that say how tokens are chosen: of generate.py and of chat.py. Imports no JAX."""

import argparse

from jaxinfer.request import LIMITS, SamplingParams
from serving.output_text import TextOptions
from serving.validate import check_stop


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, when that ends, and what is told of it."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-k", type=int, default=0, help="0 is off (default)")
    add("--top-p", type=float, default=1.0, help="1 is off (default)")
    add("--min-p", type=float, default=0.0, help="0 is off (default)")
    add("--repetition-penalty", type=float, default=1.0, help="1 is off (default)")
    add("--presence-penalty", type=float, default=0.0, help="0 is off (default)")
    add("--frequency-penalty", type=float, default=0.0, help="0 is off (default)")
    add(
        "--logit-bias",
        type=parse_bias,
        action="append",
        default=[],
        metavar="ID=VALUE",
        help="added to the logit of a token; may be given again",
    )
    add("--seed", type=int, help="repeats a sampled run (default: random)")
    group = parser.add_argument_group("end of the text")
    add = group.add_argument
    add("--max-tokens", type=int, help="new tokens at most (default: 256, or what the context has)")
    add("--min-tokens", type=int, default=0, help="no end before so many new tokens (default: 0)")
    again = "; may be given again"
    add("--stop", action="append", default=[], metavar="TEXT", help=f"end before this text{again}")
    add(
        "--stop-token-id",
        type=int,
        action="append",
        default=[],
        metavar="ID",
        help=f"end at this token{again}",
    )
    add("--ignore-eos", action="store_true", help="go on past the end of the text")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--n", type=int, default=1, help="choices, continuations of each prompt (default: 1)")
    top = "and of this many of the most probable ones, in JSON"
    add("--logprobs", type=int, metavar="K", help=f"log-probabilities of new tokens, {top}")
    add("--prompt-logprobs", type=int, metavar="K", help="the same of prompt tokens")


def parse_bias(argument: str) -> tuple[int, float]:
    """ID=VALUE."""
    token_id, _, value = argument.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ID=VALUE, got {argument!r:.80}") from None


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """The sampling asked for; without a seed where one is to be chosen for each prompt."""
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=tuple(options.logit_bias),
        seed=options.seed or 0,
    )


def checked_text_options(options: argparse.Namespace) -> TextOptions:
    """How the text is asked for."""
    check_stop(options.stop)
    for name in ("min_tokens", "n", "logprobs", "prompt_logprobs"):
        value = getattr(options, name)
        if value is not None:
            LIMITS[name].check(name, value)
    return TextOptions(stop=tuple(options.stop), min_tokens=options.min_tokens)
