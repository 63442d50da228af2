"""Body of the TPU kernel of ``grouped_matmul``: a scale for each group of inputs of an output.

A block of weights becomes floats in vector memory, in the activations' dtype, chunk by chunk of
inputs, for all rows of the batch together; the order of sums is that of the chunks, whatever else
is in the batch. Axis letters: T rows, I inputs, G of a group, O outputs of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_matmul.tpu_blocks import (
    STEP_AXIS,
    chunk_at,
    for_each_chunk,
)
from pallas_kernels.tpu_registers import NUM_LANES, SUBLANES

NIBBLE = 15
HALVES = 0x000F000F  # a nibble of each half of a word
TWICE_128 = 0x43004300  # bfloat16's 128; a nibble more in the last of its bits is as much more
MINUS_8 = -0x77777778  # eight nibbles 0..15 exclusive-or this are -8..7 in two's complement


@dataclass(frozen=True)
class Form:
    """Constants of a kernel: G, inputs of a chunk, whether there are minimums.

    ``is_halved``: packed weights are made in bfloat16, two in a word.
    """

    group: int
    chunk: int
    has_minimums: bool
    is_halved: bool


def multiply_dequantized(x: Any, values: Any, scales: Any, *refs: Any, form: Form) -> None:
    """Refs: ``x`` [T, I], ``values`` [I, O] or packed [I/2, O], ``scales`` [I/G, O].

    Then minimums [I/G, O] if there are, outputs [T, O] float32, and scratch memory: rows [T, I] if
    values are packed, and [I/G, O] for scales and minimums each that are made of others: float32
    of float16's bits, or int32 of bfloat16 twice.
    """
    rest = list(refs)
    minimums = rest.pop(0) if form.has_minimums else None
    outputs = rest.pop(0)
    rows = x
    if values.dtype == jnp.uint8:
        rows = ordered = rest.pop(0)

        @pl.when(pl.program_id(STEP_AXIS) == 0)
        def _order_rows() -> None:
            order_rows(x, ordered, form)

    scales = made_of(scales, rest, form)
    minimums = None if minimums is None else made_of(minimums, rest, form)
    outputs[...] = jnp.zeros_like(outputs)

    def add(index: Any) -> None:
        weights = plain_weights
        if values.dtype == jnp.uint8:
            weights = halved_weights if form.is_halved else packed_weights
        matrix = jnp.concatenate(list(weights(values, scales, minimums, index, form)))
        outputs[...] += jnp.dot(
            rows[:, chunk_at(index, form.chunk)],
            matrix.astype(x.dtype),
            precision=exactly(x.dtype),
            preferred_element_type=jnp.float32,
        )

    for_each_chunk(x.shape[1], form.chunk, outputs.shape[1], add)


def plain_weights(
    values: Any, scales: Any, minimums: Any, index: Any, form: Form
) -> Iterator[jax.Array]:
    """Weights of a chunk, [G, O] of each group."""
    integers = values[chunk_at(index, form.chunk), :]
    for place in range(form.chunk // form.group):
        row = pl.ds(index * (form.chunk // form.group) + place, 1)
        part = integers[place * form.group : (place + 1) * form.group].astype(jnp.float32)
        weights = part * scales[row, :]
        yield weights if minimums is None else weights + minimums[row, :]


def packed_weights(
    values: Any, scales: Any, minimums: Any, index: Any, form: Form
) -> Iterator[jax.Array]:
    """Weights of a chunk, [W, O] of each of the eight nibbles of every W words.

    A word is four bytes of as many rows of ``values``, W are those of 128 inputs.
    """
    num_words = NUM_LANES // 8
    first = pl.multiple_of(index * (form.chunk // 2), NUM_LANES // 2)
    words = pltpu.bitcast(values[pl.ds(first, form.chunk // 2), :], jnp.int32)
    if minimums is None:
        words ^= MINUS_8
    for block in range(form.chunk // NUM_LANES):
        row = index * (form.chunk // form.group) + block * (NUM_LANES // form.group)
        block_scales = of_words(scales, row, form.group)
        block_minimums = None if minimums is None else of_words(minimums, row, form.group)
        part = words[block * num_words : (block + 1) * num_words]
        for nibble in range(8):
            if block_minimums is None:
                integers = (part << (28 - 4 * nibble)) >> 28  # with its sign
                yield integers.astype(jnp.float32) * block_scales
            else:
                integers = (part >> (4 * nibble)) & NIBBLE
                yield integers.astype(jnp.float32) * block_scales + block_minimums


def of_words(numbers: Any, first: Any, group: int) -> jax.Array:
    """[I/G, O] from row ``first`` on -> [16, O]: for each word of 128 inputs that of its group."""
    shape = (SUBLANES, numbers.shape[1])
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 0) >> ((group // 8).bit_length() - 1)
    halves = []
    for begin in (0, SUBLANES):
        row = first + begin * 8 // group
        half = jnp.broadcast_to(numbers[pl.ds(row, 1), :], shape)
        for other in range(1, SUBLANES * 8 // group):
            half = jnp.where(place == other, numbers[pl.ds(row + other, 1), :], half)
        halves.append(half)
    return jnp.concatenate(halves)


def halved_weights(
    values: Any, scales: Any, minimums: Any, index: Any, form: Form
) -> Iterator[jax.Array]:
    """Weights of a chunk in bfloat16, two in a word: of each of four nibbles of both its halves.

    For TPUs that calculate with bfloat16, twice as many at a time. Scales are rounded to it:
    ``scales`` [I/G, O] has each twice in a word.
    """
    assert minimums is None
    num_words = NUM_LANES // 8
    first = pl.multiple_of(index * (form.chunk // 2), NUM_LANES // 2)
    words = pltpu.bitcast(values[pl.ds(first, form.chunk // 2), :], jnp.int32)
    for block in range(form.chunk // NUM_LANES):
        row = index * (form.chunk // form.group) + block * (NUM_LANES // form.group)
        block_scales = pltpu.bitcast(of_words(scales, row, form.group), jnp.bfloat16)
        part = words[block * num_words : (block + 1) * num_words]
        for nibble in range(4):
            bits = ((part >> (4 * nibble)) & HALVES) | TWICE_128
            yield (pltpu.bitcast(bits, jnp.bfloat16) - 136) * block_scales


def order_rows(x: Any, ordered: Any, form: Form) -> None:
    """Puts every 128 inputs of ``x`` in the order of weights: by nibble, then by word.

    Halves of words follow each other where weights are ``halved_weights``.

    By a product with a matrix of zeros and ones: it is exact, and lanes are not moved one by one.
    """
    shape = (NUM_LANES, NUM_LANES)
    source = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    # All sizes are powers of two; a division of vectors would be many operations.
    num_words, half = NUM_LANES // 8, form.group // 2
    nibble, word = lane >> (num_words.bit_length() - 1), lane & (num_words - 1)
    if form.is_halved:
        nibble = (lane >> num_words.bit_length()) + (lane & 1) * 4
        word = (lane >> 1) & (num_words - 1)
    byte = 4 * word + (nibble >> 1)
    low = byte + (byte & -half)  # groups of half as many bytes, with as many behind each
    wanted = low + (nibble & 1) * half
    order = (source == wanted).astype(jnp.float32).astype(x.dtype)

    def move(index: Any, carry: None) -> None:
        inputs = chunk_at(index, NUM_LANES)
        moved = jnp.dot(
            x[:, inputs],
            order,
            precision=exactly(x.dtype),
            preferred_element_type=jnp.float32,
        )
        ordered[:, inputs] = moved.astype(x.dtype)
        return carry

    jax.lax.fori_loop(0, x.shape[1] // NUM_LANES, move, None)


def exactly(dtype: Any) -> jax.lax.Precision | None:
    """With which precision products of ``dtype`` lose none of its bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def made_dtype(dtype: Any, form: Form) -> Any:
    """Prepares scales or minimums; None where they are multiplied with as they are."""
    if form.is_halved:
        return jnp.int32  # a bfloat16 twice
    return None if dtype == jnp.float32 else jnp.float32


def made_of(numbers: Any, scratch: list[Any], form: Form) -> Any:
    """A ref of what ``made_dtype`` says: the next of ``scratch``, or ``numbers`` itself."""
    if made_dtype(numbers.dtype, form) is None:
        return numbers
    made = scratch.pop(0)
    is_wide = numbers.dtype == jnp.float32
    wide = numbers[...] if is_wide else float32_of_bits(numbers[...])
    made[...] = twice_bfloat16(wide) if form.is_halved else wide
    return made


def twice_bfloat16(numbers: jax.Array) -> jax.Array:
    """float32 -> int32 of the bits of the nearest bfloat16, twice."""
    rounded = numbers.astype(jnp.bfloat16).astype(jnp.float32)
    high = jax.lax.bitcast_convert_type(rounded, jnp.int32)  # the others are zeros
    return high | jax.lax.shift_right_logical(high, 16)


def float32_of_bits(bits: jax.Array) -> jax.Array:
    """The numbers whose float16 is ``bits`` uint16: the TPU's compiler knows no float16.

    By integer operations, except for subnormals: in float32 they would be subnormal on the way,
    which a TPU takes for zero.
    """
    wide = bits.astype(jnp.int32)
    magnitude = wide & 0x7FFF
    rebased = (magnitude << 13) + ((127 - 15) << 23)
    # Infinity and NaN have all bits of the exponent set in both.
    rebased = jnp.where(magnitude >= 0x7C00, rebased + ((127 - 15) << 23), rebased)
    number = jax.lax.bitcast_convert_type(rebased, jnp.float32)
    number = jnp.where(magnitude < 0x400, magnitude.astype(jnp.float32) * 2.0**-24, number)
    return jnp.where(wide >= 0x8000, -number, number)
