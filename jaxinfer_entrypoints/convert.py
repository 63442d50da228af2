"""Converts a model once: ``python scripts/convert.py MODEL OUT``; then ``--model OUT``.

OUT loads without unpacking or rearranging anything, each device reading its part.
"""

from jaxinfer_entrypoints.entry import STARTED, run_main  # before all others: see there

# isort: split

import argparse
import hashlib
import os
import time
from pathlib import Path

import jax
import numpy as np

from checkpoints.calibration import CALIBRATED, METHODS, WINDOW, Calibration
from checkpoints.checkpoint import PLAIN, Checkpoint, Quantization
from checkpoints.converted.convert import Rounding, convert, provenance
from checkpoints.fetch.catalog import resolve
from checkpoints.load import open_checkpoint
from checkpoints.stored import QUANTIZATIONS, require_stored_formats
from jaxinfer.config import STORED
from jaxinfer_entrypoints.inputs.text_file import read_text
from jaxinfer_entrypoints.loading.phases import Phases
from serving.text.tokenizer import Tokenizer


def main() -> None:
    """Entry point ``jaxinfer-convert``."""
    run_main(convert_model)


def convert_model() -> None:
    """Fetches, opens, makes all parameters and writes them."""
    options = parse_arguments()
    # Everything happens on the host.
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
    text = _calibration_text(options)
    phases = Phases(STARTED, quiet=options.quiet)
    phases.add("import", time.perf_counter() - STARTED)
    folder = Path(options.out)
    if folder.exists():
        raise ValueError(f"{folder} exists: give another folder, or remove it")
    with phases.phase("download", unit="B") as progress:
        path = resolve(options.model, progress)
    with phases.phase("open"):
        checkpoint = open_checkpoint(path)
    for note in checkpoint.notes:
        phases.say(note)
    if checkpoint.tensors is None:
        raise ValueError(f"{path} has been converted already")
    dtype, quantization = np.dtype(options.dtype), _quantization(options, checkpoint)
    calibration = None
    if text is not None:
        tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.model.vocab_size)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        calibration = Calibration(options.calibrate, token_ids[: options.calibration_tokens])
    with phases.phase("hash", unit="B") as progress:
        origin = provenance(options.model, path, dtype, progress)
        if text is not None and calibration is not None:
            origin["calibration"] = {
                "method": calibration.method,
                "tokens": len(calibration.token_ids),
                "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
    with phases.phase("convert", unit="tensors") as progress:
        rounding = Rounding(quantization, calibration)
        convert(checkpoint, folder, dtype, origin, progress, rounding)
    phases.print_table()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    kind = quantization.name or dtype.name
    print(f"{folder}: {size / 2**20:.0f} MiB in {kind}; use it with --model {folder}")


def _calibration_text(options: argparse.Namespace) -> str | None:
    """Read before anything is fetched, since a wrong path is the likeliest mistake."""
    if (options.calibrate is None) != (options.calibration_text is None):
        raise ValueError("--calibrate and --calibration-text are given together")
    if options.calibrate is None:
        return None
    if options.quantize not in CALIBRATED:
        raise ValueError(
            f"--calibrate is for --quantize {', '.join(CALIBRATED)}, not {options.quantize}"
        )
    if options.calibration_tokens < WINDOW:
        raise ValueError(
            f"--calibration-tokens must be at least {WINDOW}, got {options.calibration_tokens}"
        )
    return read_text(options.calibration_text)


def _quantization(options: argparse.Namespace, checkpoint: Checkpoint) -> Quantization:
    if options.quantize == STORED:
        return Quantization(STORED, require_stored_formats(options.model, checkpoint))
    return PLAIN if options.quantize == "none" else Quantization(options.quantize)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write a model's parameters as devices read them, each its part, with the "
        "model's description, its tokenizer and where it comes from."
    )
    parser.add_argument(
        "model", help="what --model takes: a GGUF file, a folder, a known name, org/name of the hub"
    )
    parser.add_argument("out", help="the folder to be made")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the parameters; float32 loses nothing of any format (default: %(default)s)",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        default="none",
        help="what matrices are rounded to, or checkpoint for the integers that it holds, as for "
        "serve.py (default: %(default)s)",
    )
    parser.add_argument(
        "--calibrate",
        choices=METHODS,
        help="round to 4 bits with a text in view: gptq makes up for the error of each rounding, "
        "awq scales inputs that come large, awq-gptq does both (default: to the nearest)",
    )
    parser.add_argument("--calibration-text", help="a UTF-8 file like what the model is to read")
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="the text's first N tokens are looked at (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser.parse_args()
