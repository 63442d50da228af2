"""Flags that say how tokens are chosen: of generate.py and of chat.py. Imports no JAX."""

import argparse
from dataclasses import replace

from jaxinfer.request import LIMITS, SamplingParams
from serving.rpc.validate import check_stop
from serving.text.output_text import TextOptions

# What a model may come with defaults for.
BY_MODEL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, when that ends, and what is told of it."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    model = "default: as the model's generation_config.json says, else"
    add("--temperature", type=float, help=f"0 is greedy ({model} 0)")
    add("--top-k", type=int, help=f"0 is off ({model} 0)")
    add("--top-p", type=float, help=f"1 is off ({model} 1)")
    add("--min-p", type=float, help=f"0 is off ({model} 0)")
    add("--repetition-penalty", type=float, help=f"1 is off ({model} 1)")
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


def sampling_params(
    options: argparse.Namespace, defaults: SamplingParams | None = None
) -> SamplingParams:
    """The sampling asked for, and what is not as in ``defaults``.

    Without a seed where one is to be chosen for each prompt.
    """
    given = {name: getattr(options, name) for name in BY_MODEL}
    return replace(
        defaults or SamplingParams(),
        **{name: value for name, value in given.items() if value is not None},
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=tuple(options.logit_bias),
        seed=options.seed or 0,
    )


def describe_sampling(sampling: SamplingParams) -> str:
    """What of ``sampling`` is not off, such as "temperature 0.7, top_p 0.8"."""
    off = SamplingParams()
    return ", ".join(
        f"{name} {getattr(sampling, name):g}"
        for name in BY_MODEL
        if getattr(sampling, name) != getattr(off, name)
    )


def checked_text_options(options: argparse.Namespace) -> TextOptions:
    """How the text is asked for."""
    check_stop(options.stop)
    for name in ("min_tokens", "n", "logprobs", "prompt_logprobs"):
        value = getattr(options, name)
        if value is not None:
            LIMITS[name].check(name, value)
    return TextOptions(stop=tuple(options.stop), min_tokens=options.min_tokens)
