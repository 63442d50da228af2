"""Flags that say how tokens are chosen: of generate.py and of chat.py. Imports no JAX."""

import argparse
from dataclasses import replace

from jaxinfer.request import LIMITS, SAMPLING_OPTIONS, Ending, SamplingParams
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
    by_model = "as the model's generation_config.json says"
    add(
        "--min-tokens",
        type=int,
        help=f"no end before so many new tokens (default: {by_model}, else 0)",
    )
    again = "; may be given again"
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"end before this text (default: {by_model}){again}",
    )
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

    A token's bias that is not given is that of ``defaults`` too. Without a seed where one is to be
    chosen for each prompt.
    """
    defaults = defaults or SamplingParams()
    biases = dict(defaults.logit_bias)
    given = {option.name: getattr(options, option.name) for option in SAMPLING_OPTIONS}
    return replace(
        defaults,
        **{name: value for name, value in given.items() if value is not None},
        logit_bias=_merged(biases, options.logit_bias),
        seed=options.seed or 0,
    )


def _merged(
    biases: dict[int, float], given: list[tuple[int, float]]
) -> tuple[tuple[int, float], ...]:
    """``given``, where a token twice is left for the check, before what is not given."""
    named = {token_id for token_id, _ in given}
    return (*given, *(pair for pair in biases.items() if pair[0] not in named))


def describe_sampling(sampling: SamplingParams, ending: Ending | None = None) -> str:
    """Returns a model's defaults that are not off, such as "temperature 0.7"."""
    ending = ending or Ending()
    said = [
        f"{option.name} {getattr(sampling, option.name):g}"
        for option in SAMPLING_OPTIONS
        if option.has_model_default and getattr(sampling, option.name) != option.default
    ]
    if sampling.logit_bias:
        said.append(f"logit_bias of {len(sampling.logit_bias)} tokens")
    if ending.min_tokens:
        said.append(f"min_tokens {ending.min_tokens}")
    if ending.stop:
        said.append(f"stop {', '.join(f'{stop!r:.40}' for stop in ending.stop)}")
    return ", ".join(said)


def checked_text_options(
    options: argparse.Namespace, defaults: Ending | None = None
) -> TextOptions:
    """Returns the wishes for the text; what is not asked for is as in ``defaults``.

    Raises ``ValueError`` for those out of range.
    """
    defaults = defaults or Ending()
    check_stop(options.stop)
    for name in ("min_tokens", "n", "logprobs", "prompt_logprobs"):
        value = getattr(options, name)
        if value is not None:
            LIMITS[name].check(name, value)
    min_tokens = defaults.min_tokens if options.min_tokens is None else options.min_tokens
    return TextOptions(stop=tuple(options.stop) or defaults.stop, min_tokens=min_tokens)
