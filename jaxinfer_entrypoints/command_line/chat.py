"""The command line of chat.py: options of every message, checked before there is one."""

import argparse
from typing import Any, cast

from jaxinfer.request import SAMPLING_OPTIONS
from jaxinfer_entrypoints.command_line.address import add_address_option
from jaxinfer_entrypoints.command_line.sampling import (
    add_sampling_options,
    checked_text_options,
    sampling_params,
)
from serving.client.options import GenerateOptions, Message
from serving.client.requests import generate_request


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    # "resolve": options that are added again replace those of the same name.
    parser = argparse.ArgumentParser(
        description="Chat with a running server.", conflict_handler="resolve"
    )
    add_address_option(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the chat")
    add_sampling_options(parser)
    for name in ("--n", "--logprobs", "--prompt-logprobs"):
        parser.add_argument(name, type=not_for_chats, help=argparse.SUPPRESS)
    parser.set_defaults(n=1)
    options = parser.parse_args()
    if options.max_tokens is not None and options.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {options.max_tokens}")
    if options.max_tokens is not None and (options.min_tokens or 0) > options.max_tokens:
        parser.error(
            f"--min-tokens {options.min_tokens} is more than --max-tokens {options.max_tokens}"
        )
    return options


def generate_options(options: argparse.Namespace) -> GenerateOptions:
    """Returns what every request asks for; raises ``ValueError`` for what no server could take.

    What no flag says is left out: the server knows the model's defaults.
    """
    sampling, text_options = sampling_params(options), checked_text_options(options)
    wanted: dict[str, Any] = {
        option.name: getattr(options, option.name) for option in SAMPLING_OPTIONS
    }
    wanted |= {
        "logit_bias": dict(sampling.logit_bias),
        "seed": options.seed,
        "max_tokens": options.max_tokens,
        "min_tokens": text_options.min_tokens or None,
        "stop": text_options.stop,
        "stop_token_ids": options.stop_token_id,
        "ignore_eos": options.ignore_eos or None,
    }
    checked = cast(
        GenerateOptions, {n: v for n, v in wanted.items() if v not in (None, (), [], {})}
    )
    generate_request([Message("system", options.system or ""), Message("user", "")], checked)
    return checked


def not_for_chats(text: str) -> int:
    """Refuses what generate.py has and one answer has not, for argparse."""
    raise argparse.ArgumentTypeError(f"a chat has one answer, as text; got {text!r:.80}")
