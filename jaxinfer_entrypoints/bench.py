"""Measures the engine, or a running server: ``python scripts/bench.py --help``."""

from jaxinfer_entrypoints.entry import STARTED, importing, run_main  # before all others: see there

# isort: split

import argparse
import importlib
import json
import sys
import time
from types import ModuleType
from typing import Any

from jaxinfer_entrypoints.command_line.bench import add_bench_options, bench_options

# Command -> its module and what it measures. Only the module of the command that runs is imported:
# what drives a server needs no JAX. Those that make engines of their own compile them.
COMMANDS = {
    "offline": ("offline", "random prompts straight into the engine"),
    "host": ("host", "where the host's time goes in a step"),
    "techniques": ("techniques", "each technique against the naive way"),
    "speculation": ("speculation", "decoding with drafts against decoding without"),
    "programs": ("programs", "a step with drafts as one program, as two and as three"),
    "invariance": ("invariance", "the same requests in many arrangements"),
    "load": ("load", "speed and latency against the number of sequences"),
    "serve": ("serve.driver", "a running server, at a rate of requests"),
}


def main() -> None:
    """Entry point ``jaxinfer-bench``."""
    run_main(bench)


def bench() -> None:
    """Runs one command and prints its figures; raises ``ValueError`` where they are incomplete."""
    module, parser, given = parse_arguments()
    options = bench_options(parser, module.Options, given)
    figures = module.run(options) if given.command == "serve" else on_engine(module, options, given)
    if given.json:
        print(json.dumps(figures))
    elif hasattr(module, "table"):
        print(module.table(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<28} {value}")
    if hasattr(module, "check_figures"):
        module.check_figures(figures)


def on_engine(module: ModuleType, options: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of a command that needs a model in this process."""
    with importing():
        from jaxinfer_entrypoints.command_line.engine import load_options
        from jaxinfer_entrypoints.llm import LLM
        from jaxinfer_entrypoints.loading.assembly import largest_shape
        from jaxinfer_entrypoints.loading.phases import Phases

    phases = Phases(STARTED, quiet=given.quiet)
    phases.add("import", time.perf_counter() - STARTED)
    pick_shapes = None if given.command == "offline" else largest_shape
    with LLM.load(load_options(given), phases, pick_shapes) as llm:
        phases.print_table()
        startup_seconds = phases.seconds
        return module.run(llm.loaded, options) | {"startup_seconds": startup_seconds}


def parse_arguments() -> tuple[ModuleType, argparse.ArgumentParser, argparse.Namespace]:
    """Reads the command line: the module of the command, its parser, and what was given."""
    parser = argparse.ArgumentParser(description="Measure the engine, or a running server.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {
        name: commands.add_parser(name, help=summary, description=summary)
        for name, (_, summary) in COMMANDS.items()
    }
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        parser.parse_args()  # help, or an error
        raise AssertionError("argparse took no command for one")
    with importing():
        module = importlib.import_module(f"jaxinfer_entrypoints.benchmarks.{COMMANDS[name][0]}")
    add_bench_options(parsers[name], name, module.Options)
    parsers[name].add_argument("--json", action="store_true", help="print one line of JSON")
    parsers[name].add_argument("--quiet", action="store_true", help="no progress on stderr")
    if name != "serve":
        with importing():
            from jaxinfer_entrypoints.command_line.engine import add_engine_options

        add_engine_options(parsers[name])
    return module, parsers[name], parser.parse_args()
