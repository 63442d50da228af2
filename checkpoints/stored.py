"""Stored integers: matrices that a file has as integers, used as they are, and their formats.

A parameter may be made of several tensors, each of a type of its own. Their integers are stored in
the smallest format that has room for all of them: more bits, smaller groups, minimums of zero.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from checkpoints.checkpoint import Checkpoint, Tensors
from checkpoints.parameters import ParameterPath, assemble, source_names
from jaxinfer.config import STORED, MatrixFormats
from jaxinfer.declaration import Declaration
from jaxinfer.models import declared_parameters
from jaxinfer.weights import FORMATS, Format, GroupedFormat, Int8Format, Integers, QuantizedWeight

# What --quantize takes.
QUANTIZATIONS = ("none", STORED, *FORMATS)


def require_stored_formats(name: str, checkpoint: Checkpoint | None) -> MatrixFormats:
    """Returns the formats that STORED stands for in ``checkpoint``, which is called ``name``.

    Raises ``ValueError`` where it has none: no checkpoint, no tensors, or all of floats.
    """
    tensors = None if checkpoint is None else checkpoint.tensors
    found = () if tensors is None else stored_formats(tensors)
    if not found:
        raise ValueError(
            f"{name} holds no matrices of integers: --quantize {STORED} is for GGUF files and "
            f"folders that do; there are {', '.join(FORMATS)}"
        )
    return found


def stored_formats(tensors: Tensors) -> MatrixFormats:
    """Returns the format of every parameter that is made of integers alone, by its path."""
    found = {}
    for path, declared in declared_parameters(tensors.model).items():
        if len(declared.shape) > 1:
            form = _common(map(tensors.stored_format, source_names(path, declared)))
            if isinstance(form, GroupedFormat) and len(declared.inputs) > 1:
                # Devices share whole heads.
                last = declared.shape[declared.inputs[-1]]
                form = replace(form, group=math.gcd(form.group, last))
            if form is not None:
                found[path] = form
    return tuple(found.items())


def stored_integers(
    tensors: Tensors, path: ParameterPath, declared: Declaration, weight: QuantizedWeight
) -> Integers:
    """Returns the parameter at ``path`` in the format of ``weight``, and in its axes."""
    shape, form = declared.shape, weight.form
    read: dict[str, Integers] = {}
    for name in source_names(path, declared):
        parts, own = tensors.integers(name), tensors.stored_format(name)
        if isinstance(form, GroupedFormat):
            assert isinstance(own, GroupedFormat)
            parts = _converted(parts, own, form)
        read[name] = parts
    groups = list(shape)
    if isinstance(form, GroupedFormat):
        groups[weight.inputs[-1]] //= form.group
    else:
        groups = [1 if axis in weight.inputs else size for axis, size in enumerate(shape)]

    def assembled(array: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(getattr(next(iter(read.values())), array).dtype)
        return assemble(path, declared, dtype, lambda name: getattr(read[name], array), shape)

    return Integers(
        assembled("values", shape),
        assembled("scales", tuple(groups)),
        assembled("minimums", tuple(groups)) if getattr(form, "minimums", None) else None,
    )


def _common(forms: Iterable[Format | None]) -> Format | None:
    """A format that has room for all of ``forms``; None where there is none."""
    several = set(forms)
    if several == {Int8Format()}:
        return Int8Format()
    grouped = [form for form in several if isinstance(form, GroupedFormat)]
    if len(grouped) != len(several):
        return None
    minimums = {form.minimums for form in grouped} - {None}
    return GroupedFormat(
        max(form.bits for form in grouped),
        math.gcd(*(form.group for form in grouped)),
        None if not minimums else max(minimums, key=_size),
        max((form.scales for form in grouped), key=_size),
    )


def _size(dtype: str | None) -> int:
    return np.dtype(dtype).itemsize


def _converted(parts: Integers, own: GroupedFormat, form: GroupedFormat) -> Integers:
    """The same numbers in a format that has room for them."""
    values, scales, minimums = parts.values, parts.scales, parts.minimums
    if form.minimums is not None and minimums is None:
        # Of 4 bits, -8..7 are 0..15 of a minimum of -8 steps, exactly: 8 is a power of two.
        has_shift = form.bits == 4
        values = values + np.int8(8) if has_shift else values
        minimums = scales * scales.dtype.type(-8 if has_shift else 0)
    times = own.group // form.group
    return Integers(
        values,
        np.repeat(scales, times, axis=-1).astype(form.scales),
        None if minimums is None else np.repeat(minimums, times, axis=-1).astype(form.minimums),
    )
