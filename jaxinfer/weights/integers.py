"""A matrix as a checkpoint stores it where it has been quantized already."""

from dataclasses import dataclass

import numpy as np

# Sizes of groups of inputs that there are formats and kernels for.
GROUPS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Integers:
    """``values * scales + minimums``: integers, and what they stand for.

    ``values`` int8: 0..15 where there are ``minimums`` and 4 bits, else signed. ``scales`` and
    ``minimums`` (None: without) have the same axes, but along the inputs one number for each
    group; one in all where scales are the outputs' own.
    """

    values: np.ndarray
    scales: np.ndarray
    minimums: np.ndarray | None = None
