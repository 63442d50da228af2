"""GGML tensor types as numpy: how the bytes of a block become float32 numbers.

Knows no file. One entry of ``TENSOR_TYPES`` a type; the numbers are exactly those of llama.cpp's
reference dequantization (``ggml-quants.c``, ``dequantize_row_*``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from checkpoints.gguf.half import half
from checkpoints.gguf.k_blocks import q4_k, q5_k, q6_k

# Blocks are worked on in pieces whose float32 result stays in the second-level cache.
_ELEMENTS_PER_PIECE = 1 << 17


@dataclass(frozen=True)
class TensorType:
    """A tensor type: rows are cut into blocks of ``block_elements`` in ``block_bytes`` bytes.

    ``dequantize(blocks, out)`` reads uint8 ``blocks [N, block_bytes, M]`` and writes float32
    ``out [N, block_elements, M]``: the bytes of a block may lie M apart, so that one function
    serves a matrix as it is stored (M = 1) and its transpose (M = number of rows). M is always 1
    for types with one element in a block.
    """

    name: str
    block_elements: int
    block_bytes: int
    dequantize: Callable[[np.ndarray, np.ndarray], None]


def dequantize_rows(data: np.ndarray, tensor_type: TensorType) -> np.ndarray:
    """Returns float32 ``[rows, columns]`` for uint8 ``data [rows, bytes of a row]``."""
    num_rows = data.shape[0]
    num_blocks = data.shape[1] // tensor_type.block_bytes
    blocks = data.reshape(num_rows * num_blocks, tensor_type.block_bytes, 1)
    out = aligned_empty((num_rows * num_blocks, tensor_type.block_elements, 1), np.float32)
    _dequantize_in_pieces(blocks, out, tensor_type)
    return out.reshape(num_rows, num_blocks * tensor_type.block_elements)


def dequantize_columns(data: np.ndarray, tensor_type: TensorType) -> np.ndarray:
    """Returns float32 ``[columns, rows]``, the transpose of ``dequantize_rows``, contiguous.

    The quantized bytes are transposed, an eighth to a quarter of what the numbers would be.
    """
    if tensor_type.block_elements == 1:
        elements = data.view(f"V{tensor_type.block_bytes}")
        return dequantize_rows(np.ascontiguousarray(elements.T).view(np.uint8), tensor_type)
    num_rows = data.shape[0]
    num_blocks = data.shape[1] // tensor_type.block_bytes
    blocks = np.ascontiguousarray(data.T).reshape(num_blocks, tensor_type.block_bytes, num_rows)
    out = aligned_empty((num_blocks, tensor_type.block_elements, num_rows), np.float32)
    _dequantize_in_pieces(blocks, out, tensor_type)
    return out.reshape(num_blocks * tensor_type.block_elements, num_rows)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Returns an uninitialized array at a 64-byte boundary, which JAX on a CPU need not copy."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(num_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def _dequantize_in_pieces(blocks: np.ndarray, out: np.ndarray, tensor_type: TensorType) -> None:
    elements_per_block = out.shape[1] * out.shape[2]
    step = max(1, _ELEMENTS_PER_PIECE // elements_per_block)
    # Scales of a damaged file may be infinite or NaN; what they give is the same NaN everywhere.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            tensor_type.dequantize(blocks[start : start + step], out[start : start + step])


def _f32(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:, :, 0] = blocks[:, :, 0].view("<f4")


def _f16(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:, :, 0] = blocks[:, :, 0].view("<f2")


def _bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    bits = out[:, :, 0].view(np.uint32)
    bits[...] = blocks[:, :, 0].view("<u2")
    bits <<= np.uint32(16)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d q, with d float16 and q int8."""
    np.multiply(blocks[:, 2:34].view(np.int8), half(blocks, 0), out=out)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d (q - 8), with d float16 and q in 0..15; low nibbles hold the first 16 elements."""
    scale = half(blocks, 0)
    nibbles = blocks[:, 2:18]
    np.subtract(nibbles & np.uint8(15), np.float32(8), out=out[:, :16])
    np.subtract(nibbles >> np.uint8(4), np.float32(8), out=out[:, 16:])
    out *= scale


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d q + m, with d and m float16 and q in 0..15; low nibbles hold the first 16 elements."""
    scale, minimum = half(blocks, 0), half(blocks, 2)
    nibbles = blocks[:, 4:20]
    np.multiply(nibbles & np.uint8(15), scale, out=out[:, :16])
    np.multiply(nibbles >> np.uint8(4), scale, out=out[:, 16:])
    out += minimum


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d (q - 16), with d float16 and q in 0..31: nibbles as in Q4_0 and 32 fifth bits."""
    quants = five_bits(blocks[:, 2:6], blocks[:, 6:22])
    np.subtract(quants, np.float32(16), out=out)
    out *= half(blocks, 0)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d q + m, with d and m float16 and q in 0..31."""
    quants = five_bits(blocks[:, 4:8], blocks[:, 8:24])
    np.multiply(quants, half(blocks, 0), out=out)
    out += half(blocks, 2)


def five_bits(high: np.ndarray, nibbles: np.ndarray) -> np.ndarray:
    """[N, 32, M]: bit i of the four bytes ``high`` is the fifth bit of element i."""
    quants = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=1)
    bits = np.arange(8, dtype=np.uint8)[None, :, None]
    for byte in range(4):
        part = (high[:, byte : byte + 1] >> bits) & np.uint8(1)
        quants[:, 8 * byte : 8 * byte + 8] |= part << np.uint8(4)
    return quants


# By GGML's type number.
TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, _f32),
    1: TensorType("F16", 1, 2, _f16),
    2: TensorType("Q4_0", 32, 18, _q4_0),
    3: TensorType("Q4_1", 32, 20, _q4_1),
    6: TensorType("Q5_0", 32, 22, _q5_0),
    7: TensorType("Q5_1", 32, 24, _q5_1),
    8: TensorType("Q8_0", 32, 34, _q8_0),
    12: TensorType("Q4_K", 256, 144, q4_k),
    13: TensorType("Q5_K", 256, 176, q5_k),
    14: TensorType("Q6_K", 256, 210, q6_k),
    30: TensorType("BF16", 1, 2, _bf16),
}

# Names of the types that cannot be read yet, for the error that says so.
UNSUPPORTED_TENSOR_TYPES: dict[int, str] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
