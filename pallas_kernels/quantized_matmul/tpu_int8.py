"""Bodies of the TPU kernels of ``int8_matmul``: weights [O, I] as they lie.

Scales of outputs are left to whoever reads the products, which costs no pass over them.

A grid step has all inputs of a block of outputs, so that a block is one stretch of memory, and
takes them in chunks of a fixed number: a row's sums have the same order whatever else is in the
batch. Axis letters: T rows, I inputs, O outputs of a block, C inputs of a chunk, S groups of
activations within a register's 128 lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.quantized_matmul.tpu_blocks import (
    MAX_OUTPUTS,
    STEP_AXIS,
    chunk_at,
    for_each_chunk,
)
from pallas_kernels.tpu_registers import NUM_LANES

# Rows of one 8-bit tile of registers; rows are rounded to 8 bits as many at a time.
TILE_ROWS = 32
LARGEST = 127
SMALLEST_GROUP = 16  # of activations: each of fewer lanes is a copy of the rows


def multiply_floats(x: Any, values: Any, outputs: Any, *, chunk: int) -> None:
    """Refs. ``x`` [T, I], ``values`` int8 [O, I], ``outputs`` [T, O] float32.

    Values become floats of ``x``'s dtype, exactly.
    """
    outputs[...] = jnp.zeros_like(outputs)

    def add(index: Any) -> None:
        inputs = chunk_at(index, chunk)
        weights = values[:, inputs].astype(x.dtype)
        outputs[...] += contract_inputs(x[:, inputs], weights, jnp.float32)

    for_each_chunk(x.shape[1], chunk, outputs.shape[1], add)


def multiply_rows(
    x: Any,
    values: Any,
    outputs: Any,
    integers: Any,
    steps: Any,
    sums: Any,
    *,
    chunk: int,
) -> None:
    """The same with rows rounded to ``integers`` int8 [T, I] of ``steps`` [T, 1] each, once.

    ``sums`` int32 [T, O]; T is a multiple of ``TILE_ROWS`` there, and what ``x`` lacks is zeros.
    """

    @pl.when(pl.program_id(STEP_AXIS) == 0)
    def _round_rows() -> None:
        def of_rows(read: Any, rows: pl.Slice) -> None:
            def look(index: Any, largest: jax.Array) -> jax.Array:
                part = jnp.abs(read(chunk_at(index, chunk)))
                return jnp.maximum(largest, jnp.max(part, axis=1, keepdims=True))

            nothing = jnp.zeros((TILE_ROWS, 1), jnp.float32)
            largest = jax.lax.fori_loop(0, x.shape[1] // chunk, look, nothing)
            step = largest / LARGEST
            steps[rows, :] = step
            divisor = jnp.where(step == 0, 1, step)

            def round_chunk(index: Any) -> None:
                inputs = chunk_at(index, chunk)
                integers[rows, inputs] = jnp.round(read(inputs) / divisor).astype(jnp.int8)

            for_each_chunk(x.shape[1], chunk, MAX_OUTPUTS, round_chunk)

        for_each_tile(x, of_rows)

    sums[...] = jnp.zeros_like(sums)

    def add(index: Any) -> None:
        inputs = chunk_at(index, chunk)
        sums[...] += contract_inputs(integers[:, inputs], values[:, inputs], jnp.int32)

    for_each_chunk(x.shape[1], chunk, outputs.shape[1], add)
    rows = pl.ds(0, x.shape[0])
    outputs[...] = sums[rows, :].astype(jnp.float32) * steps[rows, :]


def multiply_groups(
    x: Any,
    values: Any,
    outputs: Any,
    integers: Any,
    steps: Any,
    *,
    chunk: int,
    group: int,
) -> None:
    """The same with a step for each ``group`` of inputs of a row: a sum of integers each.

    A product of fewer than 128 inputs takes as long as one of 128: of groups that lie in the same
    lanes, S copies of the rows each keep one and have zeros for the others. ``integers`` int8
    [S, T, I], ``steps`` [I/C, T, 128] float32, a lane for each group of a chunk.
    """
    copies = max(1, NUM_LANES // group)
    span = max(group, NUM_LANES)  # inputs of one product
    num_rows = integers.shape[1]

    @pl.when(pl.program_id(STEP_AXIS) == 0)
    def _round_groups() -> None:
        def of_rows(read: Any, rows: pl.Slice) -> None:
            def of_chunk(index: Any, carry: None) -> None:
                lane = jax.lax.broadcasted_iota(jnp.int32, (TILE_ROWS, NUM_LANES), 1)
                chunk_steps = jnp.zeros((TILE_ROWS, NUM_LANES), jnp.float32)
                for offset in range(0, chunk, span):
                    inputs = pl.ds(pl.multiple_of(index * chunk + offset, NUM_LANES), span)
                    part = read(inputs)
                    place = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1)
                    for copy in range(copies):
                        is_mine = (place >= copy * group) & (place < (copy + 1) * group)
                        mine = jnp.where(is_mine, part, 0)
                        step = jnp.max(jnp.abs(mine), axis=1, keepdims=True) / LARGEST
                        rounded = jnp.round(mine / jnp.where(step == 0, 1, step))
                        integers[copy, rows, inputs] = rounded.astype(jnp.int8)
                        chunk_steps = jnp.where(lane == offset // group + copy, step, chunk_steps)
                steps[index, rows, :] = chunk_steps
                return carry

            jax.lax.fori_loop(0, x.shape[1] // chunk, of_chunk, None)

        for_each_tile(x, of_rows)

    outputs[...] = jnp.zeros_like(outputs)
    kept = x.shape[0]

    def add(index: Any) -> None:
        total = jnp.zeros(outputs.shape, jnp.float32)
        chunk_steps = steps[index]
        for offset in range(0, chunk, span):
            inputs = pl.ds(pl.multiple_of(index * chunk + offset, NUM_LANES), span)
            rows = integers[:, :, inputs].reshape(copies * num_rows, span)
            products = contract_inputs(rows, values[:, inputs], jnp.int32)
            for copy in range(copies):
                mine = products[copy * num_rows : copy * num_rows + kept].astype(jnp.float32)
                place = offset // group + copy
                total += mine * chunk_steps[:kept, place : place + 1]
        outputs[...] += total

    for_each_chunk(x.shape[1], chunk, outputs.shape[1], add)


def contract_inputs(rows: jax.Array, weights: jax.Array, dtype: Any) -> jax.Array:
    """[T, C], [O, C] -> [T, O]. float32 in all its bits."""
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        rows, weights, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype
    )


def for_each_tile(x: Any, do: Any) -> None:
    """Calls ``do(read, rows)`` for every ``TILE_ROWS`` rows, zeros added behind the last ones.

    ``read(inputs)`` is x[rows, inputs] in float32.
    """
    num_rows = x.shape[0]

    def read_some(first: Any, count: int, inputs: pl.Slice) -> jax.Array:
        part = x[pl.ds(first, count), inputs].astype(jnp.float32)
        missing = jnp.zeros((TILE_ROWS - count, part.shape[1]), jnp.float32)
        return part if count == TILE_ROWS else jnp.concatenate([part, missing])

    def body(index: Any, carry: None) -> None:
        first = pl.multiple_of(index * TILE_ROWS, TILE_ROWS)
        do(lambda inputs: read_some(first, TILE_ROWS, inputs), pl.ds(first, TILE_ROWS))
        return carry

    whole = num_rows // TILE_ROWS
    jax.lax.fori_loop(0, whole, body, None)
    if num_rows % TILE_ROWS:
        first = whole * TILE_ROWS
        do(lambda inputs: read_some(first, num_rows - first, inputs), pl.ds(first, TILE_ROWS))
