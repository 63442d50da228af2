"""Flags that say how tokens are chosen: of generate.py and of chat.py. Imports no JAX."""

import argparse
from dataclasses import replace

from jaxinfer.request import LIMITS, SAMPLING_OPTIONS, SamplingParams
from serving.text.output_text import TextOptions, check_stop


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds flags for the choice of tokens, for the end of the text and for the output."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    for option in SAMPLING_OPTIONS:
        default = "default"
        if option.has_model_default:
            default = "default: as the model's generation_config.json says, else"
            default += f" {option.default:g}"
        flag = f"--{option.name.replace('_', '-')}"
        add(flag, type=option.kind, help=f"{option.neutral} ({default})")
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
    """Reads ID=VALUE."""
    token_id, _, value = argument.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ID=VALUE, got {argument!r:.80}") from None


def sampling_params(
    options: argparse.Namespace, defaults: SamplingParams | None = None
) -> SamplingParams:
    """Returns the sampling asked for; what is not asked for is as in ``defaults``.

    Without a seed where one is to be chosen for each prompt.
    """
    given = {option.name: getattr(options, option.name) for option in SAMPLING_OPTIONS}
    return replace(
        defaults or SamplingParams(),
        **{name: value for name, value in given.items() if value is not None},
        logit_bias=tuple(options.logit_bias),
        seed=options.seed or 0,
    )


def describe_sampling(sampling: SamplingParams) -> str:
    """Returns a model's defaults that are not off, such as "temperature 0.7"."""
    return ", ".join(
        f"{option.name} {getattr(sampling, option.name):g}"
        for option in SAMPLING_OPTIONS
        if option.has_model_default and getattr(sampling, option.name) != option.default
    )


def checked_text_options(options: argparse.Namespace) -> TextOptions:
    """Returns the wishes for the text. Raises ``ValueError`` for those out of range."""
    check_stop(options.stop)
    for name in ("min_tokens", "n", "logprobs", "prompt_logprobs"):
        value = getattr(options, name)
        if value is not None:
            LIMITS[name].check(name, value)
    return TextOptions(stop=tuple(options.stop), min_tokens=options.min_tokens)
