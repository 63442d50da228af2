"""Products with matrices of integers on TPU by Mosaic kernels.

Weights stream through vector memory in blocks of all inputs of some outputs, the next one on its
way while one is multiplied; rows stay there, and are rounded or put in order once. See tpu_int8.py
and tpu_grouped.py for what is computed, tpu_blocks.py for how it is cut.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_matmul import tpu_blocks, tpu_grouped, tpu_int8
from pallas_kernels.tpu_registers import NUM_LANES, SUBLANES

# Where this backend runs.
PLATFORMS: frozenset[str] | None = frozenset({"tpu"})

TILE_ROWS = tpu_int8.TILE_ROWS
BFLOAT16_GENERATION = 6


def int8_matmul(
    inputs: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activation_bits: int,
    activation_group: int | None = None,
) -> jax.Array:
    """See ``pallas_kernels.quantized_matmul``. 16 bits: in the dtype of ``inputs``.

    Raises ``NotImplementedError`` with the reason where the kernel is not made for this.
    """
    x = _rows(inputs.reshape(inputs.shape[0], -1))
    num_rows, num_inputs = x.shape
    outputs = scales.shape
    if values.ndim > 2 and outputs[-1] % TILE_ROWS:
        # Else matrices of several axes of outputs would be copied to lie as one.
        raise NotImplementedError(f"{outputs[-1]} outputs are no multiple of {TILE_ROWS}")
    matrices = tpu_blocks.flat_outputs(outputs)
    copies = 1
    if activation_group is not None:
        _check_activation_group(activation_group)
        copies = max(1, NUM_LANES // activation_group)
    is_rounded = activation_bits == 8
    blocks = tpu_blocks.plan(
        num_rows,
        num_inputs,
        matrices,
        input_bytes=1,
        row_bytes=x.dtype.itemsize + copies * is_rounded,
        sum_bytes=4 * is_rounded,
        chunk_multiple=max(NUM_LANES, activation_group or 1),
    )
    rows = -(-blocks.rows // TILE_ROWS) * TILE_ROWS
    options = {"chunk": blocks.chunk}
    if not is_rounded:
        body, scratch = tpu_int8.multiply_floats, []
    elif activation_group is None:
        body = tpu_int8.multiply_rows
        scratch = [
            pltpu.VMEM((rows, num_inputs), jnp.int8),
            pltpu.VMEM((rows, 1), jnp.float32),
            pltpu.VMEM((rows, blocks.outputs), jnp.int32),
        ]
    else:
        body, options = tpu_int8.multiply_groups, {**options, "group": activation_group}
        scratch = [
            pltpu.VMEM((copies, rows, num_inputs), jnp.int8),
            pltpu.VMEM((num_inputs // blocks.chunk, rows, NUM_LANES), jnp.float32),
        ]
    products = tpu_blocks.call(
        functools.partial(body, **options),
        blocks,
        (x, values.reshape(*matrices, num_inputs)),
        [
            pl.BlockSpec(
                (None, blocks.outputs, num_inputs),
                lambda core, _, step: (*blocks.place(core, step), 0),
            )
        ],
        scratch,
        matrices[1],
        f"int8_matmul_{activation_bits}_{activation_group or 0}"
        f"_{num_rows}x{num_inputs}x{matrices[1]}",
    )
    return _as_rows(products, inputs.shape[0], outputs) * scales[None]


def grouped_matmul(
    inputs: jax.Array, values: jax.Array, scales: jax.Array, minimums: jax.Array | None
) -> jax.Array:
    """See ``pallas_kernels.quantized_matmul``.

    Where the TPU calculates with bfloat16 and rows are of it, 4-bit integers without minimums are
    scaled in it, by scales rounded to it: an error of 2^-8 of a weight instead of 2^-9.
    Raises ``NotImplementedError`` with the reason where the kernel is not made for this.
    """
    x = _rows(inputs)
    num_rows, num_inputs = x.shape
    is_packed = values.dtype == jnp.uint8
    numbers = [scales] if minimums is None else [scales, minimums]
    group = num_inputs // scales.shape[0]
    _check_groups(group, numbers, is_packed)
    outputs = values.shape[1:]
    width = outputs[-1] if outputs else 1
    is_bfloat16 = x.dtype == jnp.bfloat16 and has_bfloat16_arithmetic()
    form = functools.partial(
        tpu_grouped.Form,
        group=group,
        has_minimums=minimums is not None,
        is_halved=is_packed and minimums is None and is_bfloat16,
    )
    blocks = tpu_blocks.plan(
        num_rows,
        num_inputs,
        (math.prod(outputs[:-1]), width),
        # With 4 bytes more, of one buffer, for what is made of scales.
        input_bytes=(0.5 if is_packed else 1) + sum(n.dtype.itemsize + 2 for n in numbers) / group,
        row_bytes=x.dtype.itemsize * (1 + is_packed),
        sum_bytes=0,
        chunk_multiple=NUM_LANES,
    )

    def matrices(array: jax.Array) -> jax.Array:
        """[N, O..., F] -> [A, N, F]: as they lie in memory already."""
        return jnp.moveaxis(array.reshape(array.shape[0], -1, width), 1, 0)

    def spec(array: jax.Array) -> pl.BlockSpec:
        def index(core: int, _: int, step: int) -> tuple[int, int, int]:
            matrix, block = blocks.place(core, step)
            return matrix, 0, block

        return pl.BlockSpec((None, array.shape[0], blocks.outputs), index)

    form = form(chunk=blocks.chunk)
    scratch = [pltpu.VMEM((blocks.rows, num_inputs), x.dtype)] if is_packed else []
    for array in numbers:
        made = tpu_grouped.made_dtype(array.dtype, form)
        if made is not None:
            scratch.append(pltpu.VMEM((array.shape[0], blocks.outputs), made))
    operands = [values, *map(_bits, numbers)]
    products = tpu_blocks.call(
        functools.partial(tpu_grouped.multiply_dequantized, form=form),
        blocks,
        (x, *map(matrices, operands)),
        [spec(array) for array in operands],
        scratch,
        width,
        f"grouped_matmul_{values.dtype.name}_{group}{'' if minimums is None else '_minimums'}"
        f"_{num_rows}x{num_inputs}x{width}",
    )
    return _as_rows(products, inputs.shape[0], outputs)


def has_bfloat16_arithmetic() -> bool:
    """Tells if the TPU that is traced for calculates with bfloat16: from v6e on.

    The mesh of the context says which it is, or the devices at hand do.
    """
    try:
        return pltpu.get_tpu_info().generation >= BFLOAT16_GENERATION
    except ValueError:  # it is not known: what all can
        return False


def _rows(x: jax.Array) -> jax.Array:
    """[T, I] -> T a multiple of the sublanes."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"rows are {x.dtype}, not float32 or bfloat16")
    missing = -x.shape[0] % SUBLANES
    return jnp.pad(x, ((0, missing), (0, 0))) if missing else x


def _as_rows(products: jax.Array, num_rows: int, outputs: tuple[int, ...]) -> jax.Array:
    """[A, T, F] -> [T, O...]."""
    return jnp.moveaxis(products, 0, 1)[:num_rows].reshape(num_rows, *outputs)


def _bits(numbers: jax.Array) -> jax.Array:
    """float16 as uint16: the kernel's compiler does not know it."""
    if numbers.dtype != jnp.float16:
        return numbers
    return jax.lax.bitcast_convert_type(numbers, jnp.uint16)


def _check_groups(group: int, numbers: list[jax.Array], is_packed: bool) -> None:
    smallest = 2 * SUBLANES if is_packed else SUBLANES
    if group % smallest or NUM_LANES % group:
        raise NotImplementedError(
            f"groups of {group} are no multiple of {smallest} or do not divide {NUM_LANES}"
        )
    for array in numbers:
        if array.dtype not in (jnp.float16, jnp.float32):
            raise NotImplementedError(f"scales or minimums are {array.dtype}")


def _check_activation_group(group: int) -> None:
    if group < tpu_int8.SMALLEST_GROUP or (NUM_LANES % group and group % NUM_LANES):
        raise NotImplementedError(
            f"activations in groups of {group}: not {tpu_int8.SMALLEST_GROUP} or more that divide "
            f"{NUM_LANES} or are a multiple of it"
        )
