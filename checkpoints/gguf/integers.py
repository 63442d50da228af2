"""GGML's quantized types as the integers they are, instead of the numbers they stand for.

What a block holds (``ggml-quants.c``) becomes signed integers, or 0..15 with a minimum, a scale for
each group and nothing else. Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 lose nothing; the scales of K-quants
are products, d s, which are rounded to float16.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from checkpoints.gguf.blocks import TensorType, five_bits
from checkpoints.gguf.half import half
from checkpoints.gguf.k_blocks import q5_k_integers, q6_k_integers, six_bit_scales, split_nibbles
from jaxinfer.weights import GroupedFormat, Integers

# Values [N, elements, 1], scales and minimums [N, groups, 1] of blocks [N, bytes, 1].
_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class StoredType:
    """The format of a type's integers; ``rounds``: whether scales are rounded for it."""

    form: GroupedFormat
    split: Callable[[np.ndarray], _Parts]
    rounds: bool = False


def split_blocks(data: np.ndarray, tensor_type: TensorType) -> tuple[Integers, float]:
    """Returns integers [rows, columns] of uint8 ``data [rows, bytes of a row]``.

    And the largest part of itself that a scale or minimum was off after rounding to float16.
    """
    num_rows = data.shape[0]
    blocks = data.reshape(-1, tensor_type.block_bytes, 1)
    values, scales, minimums = STORED_TYPES[tensor_type.name].split(blocks)
    rounded = [_rounded(part, num_rows) for part in (scales, minimums) if part is not None]
    arrays = [array for array, _ in rounded]
    integers = Integers(values.reshape(num_rows, -1), arrays[0], *arrays[1:])
    return integers, max(error for _, error in rounded)


def _rounded(numbers: np.ndarray, num_rows: int) -> tuple[np.ndarray, float]:
    with np.errstate(all="ignore"):  # of a damaged file: found by those who look for the infinite
        halves = numbers.astype(np.float16)
        errors = np.abs(halves.astype(np.float32) - numbers)
        relative = np.max(errors / np.maximum(np.abs(numbers), np.float32(2**-24)), initial=0)
    return halves.reshape(num_rows, -1), float(relative)


def _q8_0(blocks: np.ndarray) -> _Parts:
    return blocks[:, 2:34].view(np.int8), half(blocks, 0), None


def _q4_0(blocks: np.ndarray) -> _Parts:
    return _nibbles(blocks[:, 2:18]) - np.int8(8), half(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> _Parts:
    return _nibbles(blocks[:, 4:20]), half(blocks, 0), half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> _Parts:
    integers = five_bits(blocks[:, 2:6], blocks[:, 6:22]).view(np.int8)
    return integers - np.int8(16), half(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> _Parts:
    integers = five_bits(blocks[:, 4:8], blocks[:, 8:24]).view(np.int8)
    return integers, half(blocks, 0), half(blocks, 2)


def _q4_k(blocks: np.ndarray) -> _Parts:
    scales, minimums = six_bit_scales(blocks)
    integers = split_nibbles(blocks[:, 16:144]).reshape(len(blocks), 256, 1)
    return integers.view(np.int8), scales, -minimums


def _q5_k(blocks: np.ndarray) -> _Parts:
    scales, minimums = six_bit_scales(blocks)
    return q5_k_integers(blocks).reshape(len(blocks), 256, 1).view(np.int8), scales, -minimums


def _q6_k(blocks: np.ndarray) -> _Parts:
    integers, scales = q6_k_integers(blocks)
    return integers.reshape(len(blocks), 256, 1), scales, None


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1).view(np.int8)


# By the types' names.
STORED_TYPES: Mapping[str, StoredType] = {
    "Q8_0": StoredType(GroupedFormat(8, 32), _q8_0),
    "Q4_0": StoredType(GroupedFormat(4, 32), _q4_0),
    "Q4_1": StoredType(GroupedFormat(4, 32, "float16"), _q4_1),
    "Q5_0": StoredType(GroupedFormat(8, 32), _q5_0),
    "Q5_1": StoredType(GroupedFormat(8, 32, "float16"), _q5_1),
    "Q4_K": StoredType(GroupedFormat(4, 32, "float16"), _q4_k, rounds=True),
    "Q5_K": StoredType(GroupedFormat(8, 32, "float16"), _q5_k, rounds=True),
    "Q6_K": StoredType(GroupedFormat(8, 16), _q6_k, rounds=True),
}
