"""Groups of numbers as integers of a few bits: their scales and minimums, and the nearest integers.

``groups`` have an axis of one group's members; scales and minimums have a 1 there. Arrays are
numpy's or JAX's, and what is made of them is of the same kind.
"""

from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np


class GroupNumbers(Protocol):
    """Integers of 4 or 8 ``bits``, and the dtypes of their ``scales`` and ``minimums``."""

    @property
    def bits(self) -> int: ...

    @property
    def scales(self) -> str: ...

    @property
    def minimums(self) -> str | None: ...


def steps_of_groups(groups: Any, form: GroupNumbers, axis: int) -> tuple[Any, Any]:
    """Scales, and minimums or None, in the dtypes of ``form``; ``axis`` is that of the members."""
    numpy = _numpy(groups)
    groups = groups.astype(numpy.float32)
    largest = numpy.float32(numpy.finfo(form.scales).max)

    def rounded(scales: Any) -> Any:
        return numpy.clip(scales, -largest, largest).astype(form.scales)

    low = numpy.min(groups, axis=axis, keepdims=True)
    high = numpy.max(groups, axis=axis, keepdims=True)
    if form.minimums is not None:
        return rounded((high - low) / _levels(form)[1]), rounded(low).astype(form.minimums)
    if form.bits == 4:
        # The number of the largest magnitude, with its sign, is -8 of them: kept as it is.
        return rounded(numpy.where(-low >= high, low, high) / -8), None
    return rounded(numpy.maximum(numpy.abs(low), numpy.abs(high)) / 127), None


def nearest(groups: Any, scales: Any, minimums: Any, form: GroupNumbers) -> Any:
    """int8, the integers of ``form`` that stand for the nearest numbers."""
    numpy = _numpy(groups)
    steps = scales.astype(numpy.float32)
    shifted = groups.astype(numpy.float32)
    if minimums is not None:
        shifted = shifted - minimums.astype(numpy.float32)
    integers = numpy.round(shifted / numpy.where(steps == 0, 1, steps))
    return numpy.clip(integers, *_levels(form)).astype(numpy.int8)


def numbers(integers: Any, scales: Any, minimums: Any) -> Any:
    """Float32, what integers stand for."""
    numpy = _numpy(integers)
    found = integers.astype(numpy.float32) * scales.astype(numpy.float32)
    return found if minimums is None else found + minimums.astype(numpy.float32)


def _levels(form: GroupNumbers) -> tuple[int, int]:
    if form.minimums is not None:
        return 0, 15 if form.bits == 4 else 127
    return (-8, 7) if form.bits == 4 else (-127, 127)


def _numpy(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jnp
