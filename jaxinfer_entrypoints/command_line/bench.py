"""Flags of bench.py's commands. Imports no JAX: what drives a server needs none."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxinfer_entrypoints.benchmarks.serve.options import GOODPUT_METRICS
from jaxinfer_entrypoints.benchmarks.serve.requests import DEFAULT_NUM_PROMPTS
from jaxinfer_entrypoints.command_line.address import add_address_option


def add_bench_options(parser: argparse.ArgumentParser, command: str, kind: Any) -> None:
    """Adds the flags of a command, whose options are the dataclass ``kind``: its defaults too."""
    _ADD_FLAGS[command](parser)
    parser.set_defaults(**{field.name: field.default for field in dataclasses.fields(kind)})


def bench_options(parser: argparse.ArgumentParser, kind: Any, given: argparse.Namespace) -> Any:
    """Returns the options of a command; ends the program for what cannot be."""
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(kind)}
    try:
        return kind(**values)
    except ValueError as error:
        parser.error(str(error))


def _add_offline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt-len", type=int, help="tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, help="tokens (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, help="default: %(default)s")


def _add_host(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-steps", type=int, help="default: %(default)s")


def _add_techniques(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", help="rows whose technique contains this")


def _add_speculation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, nargs="+", help="sequences at once (default: 1)")
    parser.add_argument("--output-len", type=int, help="new tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="of sampling (default: greedy)")
    parser.add_argument(
        "--simulate",
        type=int,
        nargs="+",
        metavar="PERCENT",
        help="measure also with drafts that are right in so many of 100 cases",
    )
    parser.add_argument("--plot", type=Path, help="a PNG file of --simulate (needs matplotlib)")


def _add_programs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-len", type=int, help="new tokens (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, help="all ways in turn, so often (default: %(default)s)"
    )


def _add_invariance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", type=int, help="default: %(default)s")
    parser.add_argument(
        "--no-cost", dest="cost", action="store_false", help="do not measure what the promise costs"
    )
    parser.add_argument("--output-len", type=int, help="tokens (default: %(default)s)")


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        help="default: 1 to 64 in powers of two",
    )
    parser.add_argument("--prompt-len", type=int, help="tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, help="tokens (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="a PNG file to draw (needs matplotlib)")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_address_option(parser)
    add("--num-prompts", type=int, help=f"default: {DEFAULT_NUM_PROMPTS}, or all of --prompts")
    add(
        "--request-rate",
        type=float,
        nargs="+",
        metavar="R",
        help="requests a second; several are one run each; inf, the default, sends all at once",
    )
    shape = "shape of the gaps' gamma distribution: 1 is Poisson, less is burstier"
    add("--burstiness", type=float, help=f"{shape} (default: %(default)s)")
    add("--max-concurrency", type=int, help="requests that run at once (default: no limit)")
    add("--prompts", type=Path, metavar="FILE", help="JSON lines, as generate.py --input takes")
    add("--random-input-len", type=int, help="tokens (default: %(default)s)")
    output_help = "new tokens, of --prompts too (default: %(default)s)"
    add("--random-output-len", type=int, help=output_help)
    ratio_help = "lengths are uniform within this part of them (default: %(default)s)"
    add("--random-range-ratio", type=float, help=ratio_help)
    add("--seed", type=int, help="of prompts, arrivals, sampling (default: %(default)s)")
    add("--temperature", type=float, help="0 is greedy (default)")
    add("--percentiles", type=float, nargs="+", metavar="P", help="default: 99")
    add(
        "--goodput",
        type=parse_goodput,
        nargs="+",
        metavar="NAME:MS",
        help="a good request takes at most so many ms: ttft:300 tpot:60 e2el:5000",
    )
    add("--timeout-seconds", type=float, help="of a request (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="where the figures go as JSON too")
    add("--plot", type=Path, help="a PNG file to draw (needs matplotlib)")


def parse_goodput(text: str) -> tuple[str, float]:
    """NAME:MILLISECONDS, for argparse."""
    name, _, limit = text.partition(":")
    known = ", ".join(GOODPUT_METRICS)
    if name not in GOODPUT_METRICS or not re.fullmatch(r"\d+(\.\d+)?", limit):
        message = f"must be NAME:MILLISECONDS with a name of {known}, got {text!r:.80}"
        raise argparse.ArgumentTypeError(message)
    return name, float(limit)


# Command -> what adds its flags.
_ADD_FLAGS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "offline": _add_offline,
    "host": _add_host,
    "techniques": _add_techniques,
    "speculation": _add_speculation,
    "programs": _add_programs,
    "invariance": _add_invariance,
    "load": _add_load,
    "serve": _add_serve,
}
