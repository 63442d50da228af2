"""The command line of chat.py: what every message is sent with, checked before there is one."""

import argparse
import re
from dataclasses import fields
from typing import Any, cast

from jaxinfer.request import SamplingParams
from scripts.sampling_options import (
    add_sampling_options,
    checked_text_options,
    sampling_params,
)
from serving.client import DEFAULT_TARGET
from serving.events import GenerateOptions, Message, generate_request


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    # "resolve": options that are added again replace those of the same name.
    parser = argparse.ArgumentParser(
        description="Chat with a running server.", conflict_handler="resolve"
    )
    parser.add_argument(
        "--address",
        type=parse_address,
        default=DEFAULT_TARGET,
        metavar="HOST:PORT",
        help="where the server listens (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the chat")
    add_sampling_options(parser)
    for name in ("--n", "--logprobs", "--prompt-logprobs"):
        parser.add_argument(name, type=not_for_chats, help=argparse.SUPPRESS)
    parser.set_defaults(n=1)
    options = parser.parse_args()
    if options.max_tokens is not None and options.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {options.max_tokens}")
    return options


def generate_options(options: argparse.Namespace) -> GenerateOptions:
    """What every request asks for; raises ``ValueError`` for what no server could take.

    What is as the flags have it anyway is left out: the server's defaults are the same.
    """
    sampling, text_options = sampling_params(options), checked_text_options(options)
    default = SamplingParams()
    names = [entry.name for entry in fields(SamplingParams) if entry.name != "logit_bias"]
    wanted: dict[str, Any] = {
        name: getattr(sampling, name)
        for name in names
        if getattr(sampling, name) != getattr(default, name)
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


def parse_address(text: str) -> str:
    """HOST:PORT, for argparse."""
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) <= 65535
    if not is_port or not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host):
        raise argparse.ArgumentTypeError(
            f"must be HOST:PORT with a port between 1 and 65535, got {text!r:.80}"
        )
    return text


def not_for_chats(text: str) -> int:
    """Refuses what generate.py has and one answer has not, for argparse."""
    raise argparse.ArgumentTypeError(f"a chat has one answer, as text; got {text!r:.80}")
