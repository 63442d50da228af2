"""``--address`` of the programs that call a running server. Imports no JAX."""

import argparse

from serving.address import check_address
from serving.client import DEFAULT_TARGET


def add_address_option(parser: argparse.ArgumentParser) -> None:
    """--address HOST:PORT."""
    parser.add_argument(
        "--address",
        type=parse_address,
        default=DEFAULT_TARGET,
        metavar="HOST:PORT",
        help="where the server listens (default: %(default)s)",
    )


def parse_address(text: str) -> str:
    """HOST:PORT, for argparse."""
    try:
        return check_address("it", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
