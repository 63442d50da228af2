"""Measures the engine: ``python scripts/bench.py --help``."""

import time

STARTED = time.perf_counter()

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import bench_host, bench_invariance, bench_load, bench_offline, bench_techniques
from scripts.assembly import add_engine_options, largest_shape, load_model, run_main
from scripts.phases import Phases

# Command -> its module and what it measures. Those that make engines of their own compile them.
COMMANDS = {
    "offline": (bench_offline, "random prompts straight into the engine"),
    "host": (bench_host, "where the host's time goes in a step"),
    "techniques": (bench_techniques, "each technique against the naive way"),
    "invariance": (bench_invariance, "the same requests in many arrangements"),
    "load": (bench_load, "speed and latency against the number of sequences"),
}


def main() -> None:
    """Entry point ``jaxinfer-bench``."""
    run_main(bench)


def bench() -> None:
    """Runs one command and prints its figures."""
    options = parse_arguments()
    module, _ = COMMANDS[options.command]
    phases = Phases(STARTED, quiet=options.quiet)
    phases.add("import", time.perf_counter() - STARTED)
    loaded = load_model(options, phases, None if module is bench_offline else largest_shape)
    phases.print_table()
    startup_seconds = phases.seconds
    figures = module.run(loaded, options) | {"startup_seconds": startup_seconds}
    if options.json:
        print(json.dumps(figures))
    elif hasattr(module, "table"):
        print(module.table(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<28} {value}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, (module, summary) in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=summary, description=summary)
        module.add_options(parsers[name])
        parsers[name].add_argument("--json", action="store_true", help="print one line of JSON")
        parsers[name].add_argument("--quiet", action="store_true", help="no progress on stderr")
        add_engine_options(parsers[name])
    options = parser.parse_args()
    COMMANDS[options.command][0].check_options(parsers[options.command], options)
    return options


if __name__ == "__main__":
    main()
