"""Flags of every program that loads a model, and the options that they make."""

import argparse
import dataclasses
import re
from typing import Any

from checkpoints.configs import configured_models
from checkpoints.fetch.catalog import CATALOG
from checkpoints.stored import QUANTIZATIONS
from jaxinfer.config import DTYPES, KV_DTYPES, VERIFICATIONS, EngineConfig
from jaxinfer_entrypoints.command_line.platform import add_platform_options, device_of
from jaxinfer_entrypoints.loading.options import MAX_DEVICES, MAX_KV_MEMORY, LoadOptions
from jaxinfer_entrypoints.loading.sizes import (
    CPU_KV_FRACTION,
    DEFAULT_MAX_MODEL_LEN,
    DEFAULT_PAGE_SIZES,
    GPU_KV_FRACTION,
    TPU_KV_FRACTION,
)
from pallas_kernels.ragged_paged_attention import IMPLEMENTATIONS


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that decide which model runs where and with which sizes."""
    defaults = LoadOptions()
    add_platform_options(parser)
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model",
        default=defaults.model,
        help="a GGUF file, a folder as on the Hugging Face hub or of convert.py, a model of the "
        "hub itself (org/name[@revision][:file.gguf]), or one of: "
        f"{', '.join(sorted(CATALOG))} (default: %(default)s); where no weights are needed also "
        f"one of: {', '.join(configured_models())}",
    )
    group.add_argument(
        "--no-generation-config",
        dest="generation_config",
        action="store_false",
        help="greedy by default, whatever the model's generation_config.json says",
    )
    group.add_argument(
        "--tensor-parallel",
        type=parse_count,
        metavar="N",
        help="devices that share each layer of a model (default: 1; with --tpu as many of its "
        "chips as the model's heads can be divided over)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="weights, activations and KV cache (default: float32 on CPU, else bfloat16)",
    )
    _add_format_options(group)
    group.add_argument(
        "--max-num-seqs",
        type=int,
        default=defaults.max_num_seqs,
        help="sequences that run at once (default: %(default)s)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=defaults.max_num_batched_tokens,
        help=f"prompt tokens of one step, a multiple of {EngineConfig.chunk_tile} "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        help=f"longest prompt plus output, in tokens (default: the model's context, with "
        f"longrope the original one, at most {DEFAULT_MAX_MODEL_LEN})",
    )
    page_sizes = ", ".join(f"{n} on {name.upper()}" for name, n in DEFAULT_PAGE_SIZES.items())
    group.add_argument("--page-size", type=int, help=f"tokens a KV page (default: {page_sizes})")
    group.add_argument(
        "--max-steps-per-call",
        type=int,
        help="decode steps that run in one call while nobody waits: more tokens at once, less "
        "often (default: 1 on CPU, else 4)",
    )
    _add_draft_options(group)
    group.add_argument(
        "--priority-seconds",
        type=float,
        default=defaults.priority_seconds,
        help="how much longer a request waits than one of the next higher priority before it goes "
        "first all the same (default: %(default)s)",
    )
    group.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="share no pages between requests; choices of one request still do",
    )
    group.add_argument(
        "--no-batch-invariance",
        dest="batch_invariant",
        action="store_false",
        help="faster kernels on CPU, with which tokens may depend on what else is being served",
    )
    group.add_argument(
        "--attention",
        choices=list(IMPLEMENTATIONS),
        help="backend of the attention (default: the TPU kernel on TPU, else plain XLA)",
    )
    group.add_argument(
        "--kv-memory",
        type=parse_bytes,
        help="memory of the KV cache on all devices of a replica, such as 512MiB or 4GiB (default: "
        f"of what the model leaves free, {CPU_KV_FRACTION:.0%}% on CPU but at most 1GiB, "
        f"{GPU_KV_FRACTION:.0%}% on a GPU; on a TPU {TPU_KV_FRACTION:.0%}% of what the plan of all "
        "memory leaves)",
    )


def load_options(options: argparse.Namespace) -> LoadOptions:
    """Returns the options that the flags of ``add_engine_options`` ask for.

    What a program has no flag for is as by default. Raises ``ValueError`` for what cannot be.
    """
    names = {field.name for field in dataclasses.fields(LoadOptions)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return LoadOptions(device=device_of(options), **given)


def parse_load_options(description: str) -> LoadOptions:
    """Reads a command line that has nothing but the flags of ``add_engine_options``."""
    parser = argparse.ArgumentParser(description=description)
    add_engine_options(parser)
    return load_options(parser.parse_args())


def _add_format_options(group: Any) -> None:
    """Adds ``--kv-dtype`` and ``--quantize``."""
    group.add_argument(
        "--kv-dtype",
        choices=("auto", *KV_DTYPES),
        default=LoadOptions.kv_dtype,
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


def _add_draft_options(group: Any) -> None:
    """Adds ``--draft``, ``--num-drafts``, ``--verify`` and ``--draft-quantize``."""
    defaults = LoadOptions()
    group.add_argument(
        "--draft",
        metavar="WHO",
        help="draft tokens that the model then verifies, several in one step, where that is "
        "faster; no token changes. ngram: what came after the last place that looks like the end; "
        "layers:N: the model's own first N layers; else a smaller model with the same vocabulary, "
        "named as for --model (default: no drafts)",
    )
    group.add_argument(
        "--num-drafts",
        type=int,
        default=defaults.num_drafts,
        metavar="K",
        help="drafts of a sequence in a step, at most (default: %(default)s)",
    )
    group.add_argument(
        "--verify",
        choices=VERIFICATIONS,
        default=defaults.verify,
        help="which drafts are right. exact: what the model would have chosen itself, so that "
        "tokens are those without drafts; rejection: by speculative sampling, which keeps the "
        "distribution but not the tokens of a seed (default: %(default)s)",
    )
    group.add_argument(
        "--draft-quantize",
        choices=QUANTIZATIONS,
        help="what a draft model's matrices are held in (default: as --quantize says)",
    )


def parse_bytes(text: str) -> int:
    """Bytes from 512MiB, 4GiB, 2GB or a plain number, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}; write 512MiB or 4GiB")
    number, prefix, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
    if not 1 <= size <= MAX_KV_MEMORY:
        raise argparse.ArgumentTypeError(f"must be between 1 byte and 1 PiB, got {text!r}")
    return int(size)


def parse_count(text: str) -> int:
    """A positive number of devices, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_DEVICES:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return int(text)
