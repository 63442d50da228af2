"""Two 4-bit integers in a byte, as GGML's Q4_0 and Q4_1 have them.

Of each group of G inputs, byte j holds input j in its low bits and input j + G/2 in its high ones:
a group's bytes lie together, and neither half has to be put in order before it is multiplied.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pack_nibbles(values: np.ndarray | jax.Array, group: int, axis: int) -> Any:
    """Integers 0..15 -> uint8, ``axis`` half as long; numpy's for numpy's."""
    numpy: Any = np if isinstance(values, np.ndarray) else jnp
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    halves = values.astype(numpy.uint8).reshape(*before, -1, 2, group // 2, *after)
    low, high = numpy.moveaxis(halves, axis + 1, 0)
    return (low | (high << np.uint8(4))).reshape(*before, values.shape[axis] // 2, *after)


def unpack_nibbles(packed: np.ndarray | jax.Array, group: int, axis: int) -> Any:
    """The integers 0..15 of ``pack_nibbles`` as uint8, ``axis`` twice as long."""
    numpy: Any = np if isinstance(packed, np.ndarray) else jnp
    before, after = packed.shape[:axis], packed.shape[axis + 1 :]
    bytes_ = packed.reshape(*before, -1, group // 2, *after)
    halves = numpy.stack([bytes_ & np.uint8(15), bytes_ >> np.uint8(4)], axis=axis + 1)
    return halves.reshape(*before, packed.shape[axis] * 2, *after)
