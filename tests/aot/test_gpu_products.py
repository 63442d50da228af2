"""Products with quantized matrices, compiled for an H100 that is not there.

XLA picks its own kernels by measuring on the device, which is not here: what they cost is not seen.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.quantized_matmul import float8_matmul, grouped_matmul, int8_matmul

# Of Llama 3 8B's MLP, and the rows of a step of decodes and of one with a chunk.
INPUTS, OUTPUTS, ROWS = 4096, 14336, (8, 512)


@functools.cache
def hopper() -> Any:
    spec = (Path(__file__).parent / "h100.txtpb").read_text(encoding="utf-8")
    return topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=spec)


def compiled(function: Callable[..., Any], *shapes: tuple[tuple[int, ...], Any]) -> Any:
    mesh = topologies.make_mesh(hopper(), (1,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    return jax.jit(function).trace(*arrays).lower().compile()


GROUPS = (INPUTS // 32, OUTPUTS)
CASES = {
    "int8": (
        functools.partial(int8_matmul, activation_bits=16),
        [((OUTPUTS, INPUTS), jnp.int8), ((OUTPUTS,), jnp.float32)],
    ),
    "int8-dynamic": (
        functools.partial(int8_matmul, activation_bits=8),
        [((OUTPUTS, INPUTS), jnp.int8), ((OUTPUTS,), jnp.float32)],
    ),
    "fp8": (float8_matmul, [((OUTPUTS, INPUTS), jnp.float8_e4m3fn), ((OUTPUTS,), jnp.float32)]),
    "int4": (
        grouped_matmul,
        [
            ((INPUTS // 2, OUTPUTS), jnp.uint8),
            (GROUPS, jnp.float16),
            (GROUPS, jnp.float16),
        ],
    ),
    "int4-symmetric": (
        grouped_matmul,
        [((INPUTS // 2, OUTPUTS), jnp.uint8), (GROUPS, jnp.float16)],
    ),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", CASES)
def test_it_compiles_in_little_memory(name: str, rows: int) -> None:
    """8 bits are converted within the product; of 4 bits one matrix of bfloat16 is made."""
    function, arrays = CASES[name]
    program = compiled(function, ((rows, INPUTS), jnp.bfloat16), *arrays)
    temporaries = program.memory_analysis().temp_size_in_bytes
    print(f"{name} {rows} rows: {temporaries / 2**20:.1f} MiB of temporaries")
    matrix = 2 * INPUTS * OUTPUTS
    around = 4 * rows * (INPUTS + 2 * OUTPUTS)
    assert temporaries < around + (1.05 * matrix if name.startswith("int4") else matrix / 2)
