"""GGML's types with two levels of scales (K-quants) as numpy: super-blocks of 256 elements.

The numbers are exactly those of llama.cpp's reference dequantization (``ggml-quants.c``,
``dequantize_row_q4_K`` and so on). Shapes as in gguf_blocks: ``blocks [N, bytes, M]``,
``out [N, 256, M]``.
"""

import numpy as np

from checkpoints.gguf.half import half

_NIBBLE = np.uint8(15)


def q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d s q - m t: d and m float16, s and t six bits for each 32 elements, q in 0..15."""
    scales, minima = six_bit_scales(blocks)
    nibbles = split_nibbles(blocks[:, 16:144])
    _apply(nibbles, scales, minima, out)


def q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """As Q4_K, with a fifth bit of q: bit i of 32 bytes for the i-th 32 elements."""
    scales, minima = six_bit_scales(blocks)
    _apply(q5_k_integers(blocks), scales, minima, out)


def q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d s (q - 32): d float16, s int8 for each 16 elements, q of 4 low and 2 high bits.

    In each half of 128 elements, 64 bytes hold the low bits of the first 64 elements and, above
    them, of the last 64; 32 bytes hold the high bits of all four 32 elements.
    """
    integers, scales = q6_k_integers(blocks)
    num_blocks, _, width = blocks.shape
    result = out.reshape(num_blocks, 16, 16, width)
    signed = integers.reshape(num_blocks, 16, 16, width)
    np.multiply(signed, scales[:, :, None], out=result)


def q5_k_integers(blocks: np.ndarray) -> np.ndarray:
    """uint8 [N, 8, 32, M]: 0..31."""
    quants = split_nibbles(blocks[:, 48:176])
    high = blocks[:, 16:48]
    for part in range(8):
        quants[:, part] |= ((high >> np.uint8(part)) & np.uint8(1)) << np.uint8(4)
    return quants


def q6_k_integers(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [N, 256, M], -32..31, and float32 [N, 16, M], their scales."""
    num_blocks, _, width = blocks.shape
    low = blocks[:, :128].reshape(num_blocks, 2, 64, width)
    high = blocks[:, 128:192].reshape(num_blocks, 2, 32, width)
    quants = np.empty((num_blocks, 2, 4, 32, width), np.uint8)
    both = quants.reshape(num_blocks, 2, 2, 64, width)
    np.bitwise_and(low, _NIBBLE, out=both[:, :, 0])
    np.right_shift(low, np.uint8(4), out=both[:, :, 1])
    for part in range(4):
        quants[:, :, part] |= ((high >> np.uint8(2 * part)) & np.uint8(3)) << np.uint8(4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * half(blocks, 208)
    return quants.reshape(num_blocks, 256, width).view(np.int8) - np.int8(32), scales


def split_nibbles(data: np.ndarray) -> np.ndarray:
    """[N, 128, M] bytes -> [N, 8, 32, M]: of each 32 bytes the low nibbles, then the high ones."""
    num_blocks, _, width = data.shape
    nibbles = np.empty((num_blocks, 4, 2, 32, width), np.uint8)
    data = data.reshape(num_blocks, 4, 32, width)
    np.bitwise_and(data, _NIBBLE, out=nibbles[:, :, 0])
    np.right_shift(data, np.uint8(4), out=nibbles[:, :, 1])
    return nibbles.reshape(num_blocks, 8, 32, width)


def six_bit_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima [N, 8, M] of 32 elements each, from 2 halves and 12 bytes.

    The first four of each are the low six bits of bytes 0-3 and 4-7; the upper two bits of these,
    with the nibbles of bytes 8-11, are the last four.
    """
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    low_six, top = np.uint8(63), np.uint8(6)
    scales = [first & low_six, (third & _NIBBLE) | ((first >> top) << np.uint8(4))]
    minima = [second & low_six, (third >> np.uint8(4)) | ((second >> top) << np.uint8(4))]
    return (
        half(blocks, 0) * np.concatenate(scales, axis=1).astype(np.float32),
        half(blocks, 2) * np.concatenate(minima, axis=1).astype(np.float32),
    )


def _apply(quants: np.ndarray, scales: np.ndarray, minima: np.ndarray, out: np.ndarray) -> None:
    result = out.reshape(quants.shape)
    np.multiply(quants, scales[:, :, None], out=result)
    result -= minima[:, :, None]
