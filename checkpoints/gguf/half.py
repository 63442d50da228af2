"""Float16 numbers between other bytes, in the blocks of GGML's types."""

import numpy as np


def half(blocks: np.ndarray, byte: int) -> np.ndarray:
    """The float16 at ``byte`` of each of ``blocks [N, bytes, M]``, as float32 ``[N, 1, M]``."""
    low = blocks[:, byte : byte + 1].astype(np.uint16)
    high = blocks[:, byte + 1 : byte + 2].astype(np.uint16)
    return (low | high << np.uint16(8)).view(np.float16).astype(np.float32)
