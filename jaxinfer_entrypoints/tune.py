"""Measures the attention kernel's block sizes on the TPU it runs on, and keeps the fastest.

    python scripts/tune.py --tpu v5e --kv-heads 8 --query-heads 32 --head-dim 128

writes pallas_kernels/tuned/<device>.json, which the kernel reads from then on. Under tensor
parallelism a device has its part of the heads: give those numbers.
"""

from jaxinfer_entrypoints.entry import run_main  # before all others: see there

# isort: split

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer_entrypoints.command_line.platform import add_platform_options, device_of
from jaxinfer_entrypoints.loading.devices import pick_devices
from jaxinfer_entrypoints.loading.options import LoadOptions
from pallas_kernels.ragged_paged_attention import QueryTiles, RaggedBatch, tpu
from pallas_kernels.ragged_paged_attention.packed_pages import PackedKVPages, num_lanes
from pallas_kernels.tuning import FOLDER, file_name, write_sizes

CANDIDATES = (128, 256, 512, 1024, 2048)  # tokens a block
ROUNDS = 5
CALLS_PER_ROUND = 20

Seconds = Callable[[Callable[[], jax.Array]], float]


def main() -> None:
    """As a program."""
    run_main(tune)


def tune() -> None:
    """Parses options, measures, prints a table, writes the file."""
    options = parse_arguments()
    device = pick_devices(LoadOptions(device=device_of(options)))[0]
    if device.platform != "tpu":
        raise ValueError(f"block sizes are measured on a TPU, this is {device.device_kind}")
    folder = Path(tpu.__file__).resolve().parents[1] / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / file_name(device.device_kind)
    best: dict[str, int] = {}
    for kind in ("decode", "verify", "chunk"):
        times = dict(measure(options, kind, device.device_kind, fastest_round))
        if times:
            best[kind] = min(times, key=lambda tokens: times[tokens])
        cells = ", ".join(f"{tokens}: {1e6 * taken:.0f}" for tokens, taken in times.items())
        print(f"{kind}: microseconds by tokens a block: {cells}")
    bucket = tpu.bucket_name(
        options.kv_heads,
        options.query_heads // options.kv_heads,
        num_lanes(options.head_dim),
        options.page_size,
    )
    write_sizes(path, "ragged_paged_attention", options.kv_dtype, bucket, best)
    print(f"{bucket}: {best} -> {path}")


def parse_arguments() -> argparse.Namespace:
    """Shapes of one device, and what is typical to be served."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_platform_options(parser)
    parser.add_argument("--kv-heads", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--query-heads", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--page-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument(
        "--kv-dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "int8", "uint8"),
        help="of the pages; uint8 is float8 (default: %(default)s)",
    )
    parser.add_argument("--num-seqs", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--kv-tokens", type=int, default=2048, help="length of each sequence (default: %(default)s)"
    )
    options = parser.parse_args()
    for name in ("kv_heads", "query_heads", "head_dim", "page_size", "num_seqs"):
        if not 1 <= getattr(options, name) <= 1024:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be between 1 and 1024, got {getattr(options, name)}")
    if options.query_heads % options.kv_heads:
        raise ValueError(
            f"--query-heads {options.query_heads} is no multiple of --kv-heads {options.kv_heads}"
        )
    if not 256 <= options.kv_tokens <= 131072:
        raise ValueError(f"--kv-tokens must be between 256 and 131072, got {options.kv_tokens}")
    return options


def measure(
    options: argparse.Namespace, kind: str, device_kind: str, seconds: Seconds
) -> Iterator[tuple[int, float]]:
    """Tokens a block and seconds a call, of every candidate that the kernel takes."""
    queries, keys, pages, batch = inputs(options, kind, device_kind)
    for tokens in CANDIDATES:
        if tokens < options.page_size:
            continue
        operation = functools.partial(
            tpu.ragged_paged_attention,
            scale=options.head_dim**-0.5,
            sliding_window=None,
            logit_soft_cap=None,
            kv_block_tokens=tokens,
        )
        compiled = jax.jit(operation, donate_argnums=3)
        held = [jax.tree.map(jnp.zeros_like, pages)]

        def call(compiled: Any = compiled, held: list[Any] = held) -> jax.Array:
            outputs, held[0] = compiled(queries, keys, keys, held[0], batch)
            return outputs

        try:
            jax.block_until_ready(call())
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            print(f"{kind}: {tokens} tokens a block: {str(error).splitlines()[0]}")
            continue
        yield tokens, seconds(call)


def inputs(
    options: argparse.Namespace, kind: str, device_kind: str
) -> tuple[jax.Array, jax.Array, PackedKVPages, RaggedBatch]:
    """Random rows, new keys and values alike, and pages of ``--num-seqs`` sequences.

    Decodes and verifications are one tile a sequence, chunks four tiles of its last rows.
    """
    rows, tiles_each = {"decode": (1, 1), "verify": (5, 1), "chunk": (128, 4)}[kind]
    count = options.num_seqs if kind != "chunk" else 4
    width = -(-options.kv_tokens // options.page_size)
    form = tpu.abstract_kv_pages(
        count * width,
        options.page_size,
        options.kv_heads,
        options.head_dim,
        options.kv_dtype,
        device_kind,
    )
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        dtype = "float32" if options.kv_dtype == "float32" else "bfloat16"
        return jnp.asarray(random.standard_normal(shape), dtype)

    sequences = np.repeat(np.arange(count, dtype=np.int32), tiles_each)
    order = np.tile(np.arange(tiles_each, dtype=np.int32), count)
    starts = options.kv_tokens - (tiles_each - order) * rows
    tiles = QueryTiles(
        jnp.asarray(sequences),
        jnp.asarray(starts, jnp.int32),
        jnp.full(sequences.shape, rows, jnp.int32),
        rows,
    )
    none = jnp.zeros(0, jnp.int32)
    nothing = QueryTiles(none, none, none, 8)
    table = random.permutation(count * width).reshape(count, width)
    is_chunk = kind == "chunk"
    batch = RaggedBatch(
        jnp.asarray(table, jnp.int32),
        nothing if is_chunk else tiles,
        tiles if is_chunk else nothing,
    )
    return (
        normal(tiles.num_rows, options.query_heads, options.head_dim),
        normal(tiles.num_rows, options.kv_heads, options.head_dim),
        jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), form),
        batch,
    )


def fastest_round(call: Callable[[], jax.Array]) -> float:
    """Seconds a call in the fastest of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(CALLS_PER_ROUND - 1):
            call()
        jax.block_until_ready(call())  # the last one of a queue
        best = min(best, (time.perf_counter() - begun) / CALLS_PER_ROUND)
    return best
