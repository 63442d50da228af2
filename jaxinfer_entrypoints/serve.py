"""Serves a model over gRPC: fetch, load, compile, listen. ``python scripts/serve.py --help``."""

from jaxinfer_entrypoints.entry import STARTED, run_main  # before all others: see there

# isort: split

import argparse
import gc
import logging
import os
import sys
import time

from jaxinfer_entrypoints.command_line.engine import add_engine_options, load_options, parse_count
from jaxinfer_entrypoints.command_line.sampling import describe_sampling
from jaxinfer_entrypoints.fit.compile_only import compile_only
from jaxinfer_entrypoints.fit.explain_sharding import explain_sharding
from jaxinfer_entrypoints.loading.assembly import (
    load_model,
    more_engines,
    plan_model,
)
from jaxinfer_entrypoints.loading.phases import Phases
from jaxinfer_entrypoints.memory.usage import memory_table
from serving.loop import EngineStuckError
from serving.rpc.server import LoadInterruptedError, ServerOptions, run_server
from serving.served_model import ServedModel

# For how long the engine's thread may keep the interpreter's lock from the event loop, which needs
# it several times a call. With Python's 5 ms a refusal in an overload takes seven times as long.
SWITCH_SECONDS = 5e-4


def main() -> None:
    """Entry point ``jaxinfer-serve``."""
    run_main(serve)


def serve() -> None:
    """Serves until SIGTERM or SIGINT; running requests are finished first."""
    options = parse_arguments()
    wanted = load_options(options)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    phases = Phases(STARTED)
    phases.add("import", time.perf_counter() - STARTED)
    if options.explain_sharding:
        print(explain_sharding(plan_model(wanted, phases, needs_weights=False)))
        return
    if options.compile_only:
        compile_only(wanted, phases)
        return
    described = table = ""

    def load() -> ServedModel:
        nonlocal described, table
        loaded = load_model(wanted, phases)
        engines = more_engines(loaded, phases)
        table = memory_table(engines, loaded.devices)
        where = loaded.devices[0].device_kind
        if len(loaded.devices) > 1:
            where = f"{len(loaded.devices)} x {where}"
        if said := describe_sampling(loaded.default_sampling, loaded.default_ending):
            table += f"\nsampling where a request says nothing (generation_config.json): {said}"
        described = f"{loaded.name} on {where} in {loaded.spec.dtypes.matrices}"
        return ServedModel(
            name=loaded.name,
            model=loaded.spec.model,
            engines=engines,
            engine_config=loaded.spec.config,
            dtypes=loaded.spec.dtypes,
            tokenizer=loaded.tokenizer,
            default_sampling=loaded.default_sampling,
            default_ending=loaded.default_ending,
        )

    def on_ready(port: int) -> None:
        # What was loaded stays: looking through it again takes tenths of a second each time.
        gc.collect()
        gc.freeze()
        phases.print_table()
        print(table, end="\n\n", file=sys.stderr)
        print(f"SERVING {described} at {options.host}:{port}", flush=True)

    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        run_server(
            load,
            ServerOptions(
                options.host,
                options.port,
                options.grace_seconds,
                step_timeout=options.step_timeout or None,
            ),
            on_ready=on_ready,
        )
    except LoadInterruptedError:
        os._exit(130)  # the loading thread cannot be stopped
    except EngineStuckError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # neither can the engine's
    print("stopped", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Serve a model over gRPC.")
    add_engine_options(parser)
    defaults = ServerOptions()
    group = parser.add_argument_group("server")
    group.add_argument(
        "--data-parallel",
        type=parse_count,
        default=1,
        metavar="N",
        help="replicas of the model, each on devices of its own (default: %(default)s)",
    )
    group.add_argument("--host", default=defaults.host, help="address (default: %(default)s)")
    group.add_argument(
        "--port",
        type=int,
        default=defaults.port,
        help="port, 0 for any free one (default: %(default)s)",
    )
    group.add_argument(
        "--grace-seconds",
        type=float,
        default=defaults.grace_seconds,
        help="how long running requests may go on after SIGTERM (default: %(default)s)",
    )
    group.add_argument(
        "--step-timeout",
        type=float,
        default=defaults.step_timeout,
        metavar="SECONDS",
        help="end the server when a step takes longer, 0 for never (default: %(default)s)",
    )
    instead = group.add_mutually_exclusive_group()
    instead.add_argument(
        "--explain-sharding",
        action="store_true",
        help="print which array lies where, and end; loads no weights",
    )
    instead.add_argument(
        "--compile-only",
        action="store_true",
        help="will it fit? compile for the chips that --tpu names, there or not, print what each "
        "would hold, and end; loads no weights",
    )
    options = parser.parse_args()
    if options.compile_only and options.tpu is None:
        parser.error("--compile-only needs --tpu NAME, such as --tpu v5e-8")
    if not 0 <= options.grace_seconds <= 86400:
        parser.error(f"--grace-seconds must be between 0 and 86400, got {options.grace_seconds}")
    if not 0 <= options.step_timeout <= 86400:
        parser.error(f"--step-timeout must be between 0 and 86400, got {options.step_timeout}")
    if not 0 <= options.port <= 65535:
        parser.error(f"--port must be between 0 and 65535, got {options.port}")
    return options
