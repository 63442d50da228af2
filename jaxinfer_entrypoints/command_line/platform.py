"""Flags for the platform that a program runs on. Imports no JAX."""

import argparse

from jaxinfer_entrypoints.machine.tpu_targets import parse_target


def add_platform_options(parser: argparse.ArgumentParser) -> None:
    """Adds --cpu, --gpu, --tpu NAME; without any, the best platform JAX finds."""
    group = parser.add_argument_group("platform").add_mutually_exclusive_group()
    group.add_argument("--cpu", action="store_true", help="run on the CPU")
    group.add_argument("--gpu", action="store_true", help="run on an NVIDIA GPU")
    group.add_argument(
        "--tpu",
        type=tpu_name,
        metavar="NAME",
        help="run on a TPU, called v5e (all chips of this machine; one chip with --compile-only), "
        "v5e-8, v5litepod-8, v6e-4, v5p-8, ...",
    )


def device_of(options: argparse.Namespace) -> str | None:
    """Returns the device asked for, as ``LoadOptions.device`` has it."""
    return "cpu" if options.cpu else "gpu" if options.gpu else options.tpu


def tpu_name(text: str) -> str:
    """Reads a TPU's name, for argparse."""
    try:
        parse_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
