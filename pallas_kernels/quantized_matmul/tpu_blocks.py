"""Cuts of the TPU kernels' operands in ``quantized_matmul``, and which they decline."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_registers import NUM_LANES, SUBLANES

MAX_ROWS = 512  # of a block: beyond, weights come again
MAX_OUTPUTS = 512  # of a block
CHUNKS = (512, 384, 256, 128)  # inputs at a time: the first that divides them, whatever the rows
# The first block comes while nothing is computed and should be a small part of all; a short copy
# is not worth a step of the grid.
MAX_BLOCK_BYTES = 4 * 1024 * 1024
MAX_DECODE_BLOCK_BYTES = 2 * 1024 * 1024
DECODE_ROWS = 64
VMEM_LIMIT_BYTES = 56 * 1024 * 1024  # of at least 64 MiB of a core; what a kernel may take
MAX_PLANNED_BYTES = 40 * 1024 * 1024  # of those; the rest is for values between operations

# The grid is (cores, blocks of rows, blocks of outputs of a core). Where a chip's two cores look
# like one device each takes one of the first axis; elsewhere one core takes both.
NUM_CORES = 2
STEP_AXIS = 2


@dataclass(frozen=True)
class Blocks:
    """The cut of a product [T, I] x A matrices [I, F]: the sizes of blocks, and their numbers."""

    rows: int
    outputs: int
    chunk: int
    num_row_blocks: int
    num_matrices: int
    blocks_of_matrix: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cores, row blocks, steps of a core."""
        cores = min(NUM_CORES, self.num_blocks)
        return cores, self.num_row_blocks, -(-self.num_blocks // cores)

    @property
    def num_blocks(self) -> int:
        """Counts the blocks of outputs of all matrices."""
        return self.num_matrices * self.blocks_of_matrix

    def place(self, core: Any, step: Any) -> tuple[Any, Any]:
        """Returns the matrix and the block of its outputs that a step is for.

        Of an odd number of blocks the second core does its last one twice.
        """
        block = jnp.minimum(core * self.grid[2] + step, self.num_blocks - 1)
        # Not // and %: those of signed numbers ask which TPU it is, which need not be known here.
        return jax.lax.div(block, self.blocks_of_matrix), jax.lax.rem(block, self.blocks_of_matrix)


def plan(
    num_rows: int,
    num_inputs: int,
    matrices: tuple[int, int],
    *,
    input_bytes: float,
    row_bytes: float,
    sum_bytes: float,
    chunk_multiple: int,
) -> Blocks:
    """Blocks for A ``matrices`` of F outputs that fit vector memory.

    ``input_bytes`` of an output for an input; ``row_bytes`` of a row for an input, of all its
    copies; ``sum_bytes`` of a row for an output. Chunks are multiples of ``chunk_multiple``.
    Raises ``NotImplementedError`` with the reason where there are none.
    """
    num_matrices, width = matrices
    if width < NUM_LANES:
        raise NotImplementedError(f"{width} outputs are fewer than {NUM_LANES} lanes")
    multiple = max(NUM_LANES, chunk_multiple)
    if num_inputs % multiple:
        raise NotImplementedError(f"{num_inputs} inputs are no multiple of {multiple}")
    chunk = next(
        size for size in (*CHUNKS, multiple) if not num_inputs % size and not size % multiple
    )
    most = MAX_DECODE_BLOCK_BYTES if num_rows <= DECODE_ROWS else MAX_BLOCK_BYTES
    outputs = block_outputs(width, int(most / (input_bytes * num_inputs)))
    rows = min(MAX_ROWS, num_rows)
    # Blocks that are on their way lie beside those that are worked on; a chunk is float32 once.
    fixed = outputs * (2 * input_bytes * num_inputs + 6 * chunk)
    while fixed + rows * (row_bytes * num_inputs + (8 + sum_bytes) * outputs) > MAX_PLANNED_BYTES:
        if rows <= DECODE_ROWS:
            raise NotImplementedError(
                f"{rows} rows and {outputs} outputs of {num_inputs} inputs take more than "
                f"{MAX_PLANNED_BYTES} bytes of vector memory"
            )
        rows = _round_up(rows // 2, 4 * SUBLANES)
    return Blocks(rows, outputs, chunk, -(-num_rows // rows), num_matrices, -(-width // outputs))


def block_outputs(width: int, most: int) -> int:
    """A multiple of the lanes, at most ``most`` where that is one: one that divides, if it can."""
    largest = max(NUM_LANES, min(most, MAX_OUTPUTS, width) // NUM_LANES * NUM_LANES)
    fitting = [n for n in range(NUM_LANES, largest + 1, NUM_LANES) if width % n == 0]
    return fitting[-1] if fitting and 2 * fitting[-1] >= largest else largest


def flat_outputs(shape: tuple[int, ...]) -> tuple[int, int]:
    """[O...] -> A matrices of F outputs: the last axis, with those before it while it is short."""
    width = 1
    axes = list(shape)
    while axes and width < MAX_OUTPUTS:
        width *= axes.pop()
    return math.prod(axes), width


def chunks_at_once(num_inputs: int, chunk: int, width: int) -> int:
    """Returns how many chunks of inputs a turn of the loop takes, of a block of ``width`` outputs.

    Several of narrow ones, so that they can fill each other's waits.
    """
    count = num_inputs // chunk
    return next(n for n in range(max(1, MAX_OUTPUTS // width), 0, -1) if count % n == 0)


def for_each_chunk(num_inputs: int, chunk: int, width: int, do: Any) -> None:
    """In a kernel: calls ``do`` with the index of every chunk of inputs, in order."""
    count, at_once = num_inputs // chunk, chunks_at_once(num_inputs, chunk, width)

    def turn(index: Any, carry: None) -> None:
        for place in range(at_once):
            do(index * at_once + place)
        return carry

    jax.lax.fori_loop(0, count // at_once, turn, None)


def chunk_at(index: Any, chunk: int) -> pl.Slice:
    """Returns where the inputs of a chunk are."""
    return pl.ds(pl.multiple_of(index * chunk, NUM_LANES), chunk)


def call(
    kernel: Any,
    blocks: Blocks,
    operands: tuple[jax.Array, ...],
    in_specs: list[Any],
    scratch: list[Any],
    width: int,
    name: str,
) -> jax.Array:
    """Runs a kernel over ``operands``, rows [T, I] first: products [A, T, F] float32."""
    x = operands[0]
    num_rows, num_inputs = x.shape
    count = blocks.num_matrices * width
    return pl.pallas_call(
        kernel,
        grid=blocks.grid,
        in_specs=[
            # One buffer: it changes only when all weights have been seen.
            pl.BlockSpec(
                (blocks.rows, num_inputs), lambda _, t, __: (t, 0), pipeline_mode=pl.Buffered(1)
            ),
            *in_specs,
        ],
        out_specs=pl.BlockSpec(
            (None, blocks.rows, blocks.outputs),
            lambda core, t, step: (
                blocks.place(core, step)[0],
                t,
                blocks.place(core, step)[1],
            ),
        ),
        out_shape=jax.ShapeDtypeStruct((blocks.num_matrices, num_rows, width), jnp.float32),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * num_inputs * count,
            bytes_accessed=blocks.num_row_blocks * sum(a.nbytes for a in operands[1:])
            + x.nbytes
            + 4 * num_rows * count,
            transcendentals=0,
        ),
        name=name,
    )(*operands)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
