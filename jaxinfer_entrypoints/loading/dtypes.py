"""Flags for the formats of matrices and of the KV cache, and what comes of them."""

import argparse
import dataclasses
from typing import Any

from checkpoints.checkpoint import Checkpoint
from checkpoints.stored import QUANTIZATIONS, require_stored_formats
from jaxinfer.config import KV_DTYPES, STORED, DtypePolicy
from jaxinfer.weights import check_device


def add_format_options(group: Any) -> None:
    """``--kv-dtype`` and ``--quantize``."""
    group.add_argument(
        "--kv-dtype",
        choices=("auto", *KV_DTYPES),
        default="auto",
        help="what keys and values are held in: int8 and fp8 take a byte a number and a scale for "
        "each token and head (default: %(default)s, as --dtype says)",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="hold matrices as integers: those the checkpoint has, or rounded to 8 or 4 bits "
        "while it is read. int8: a scale for each output; int8-dynamic rounds activations to 8 "
        "bits too, each row by its own scale, int8-dynamic-64 each 64 numbers of a row; int4: a "
        "scale and a minimum for each 32 inputs (or 64, 128) of an output, -symmetric without the "
        "minimum; fp8: 8-bit floats, for devices that multiply them (default: none, or what a "
        "converted model was converted to)",
    )


def pick_dtypes(
    options: argparse.Namespace, checkpoint: Checkpoint | None, device: Any
) -> DtypePolicy:
    """What the flags ask for on ``device``, or what a converted folder has been made of.

    Raises ``ValueError`` in one line for a format that is not to be had.
    """
    kv_dtype = None if options.kv_dtype == "auto" else options.kv_dtype
    dtypes = DtypePolicy.for_platform(device.platform, options.dtype, kv_dtype)
    asked = options.quantize
    if checkpoint is not None and checkpoint.quantization.name is not None:
        made = checkpoint.quantization
        if asked not in (None, STORED, made.name):
            raise ValueError(
                f"{options.model} was converted to {made.name}: leave --quantize out, or convert "
                f"what it was made of again"
            )
        name, formats = made.name, made.formats
    else:
        name = None if asked == "none" else asked
        if name is not None:
            check_device(name, device)
        formats = require_stored_formats(options.model, checkpoint) if name == STORED else ()
    return dataclasses.replace(dtypes, quantization=name, matrix_formats=formats)


def describe_rounding(checkpoint: Checkpoint) -> str:
    """Says by how much the scales of stored integers were rounded; "" where none was."""
    rounded = {name: error for name, error in checkpoint.rounding.items() if error}
    if not rounded:
        return ""
    return (
        f"; scales of {', '.join(sorted(rounded))} rounded to float16, by "
        f"{max(rounded.values()):.1e} of themselves at most"
    )
