"""Formats of matrices and of the KV cache, as options and checkpoints ask for them."""

import dataclasses
from typing import Any

from checkpoints.checkpoint import Checkpoint
from checkpoints.stored import require_stored_formats
from jaxinfer.config import STORED, DtypePolicy
from jaxinfer.weights import FORMATS
from jaxinfer_entrypoints.loading.options import LoadOptions


def pick_dtypes(options: LoadOptions, checkpoint: Checkpoint | None, device: Any) -> DtypePolicy:
    """Picks what the flags ask for on ``device``, or what a converted folder has been made of.

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
        if name is not None and name in FORMATS:
            FORMATS[name].check_device(name, device)
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
