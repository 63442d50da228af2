"""Matrices that lie packed in the tensors of a folder: found, checked, read.

For a matrix ``NAME.weight`` [out, in] of ``bits``, with ``n`` words of 32 bits for what they hold:

- awq: ``qweight`` [in, n(out)], ``qzeros`` [groups, n(out)], ``scales`` [groups, out];
- gptq: ``qweight`` [n(in), out], ``qzeros`` [groups, n(out)], ``scales`` [groups, out] and
  ``g_idx`` [in], the group of each input;
- packed: ``weight_packed`` [out, n(in)], ``weight_scale`` [out, groups], ``weight_shape`` [2],
  perhaps ``weight_zero_point`` [n(out), groups] and ``weight_g_idx`` [in];
- int8: ``weight`` int8 [out, in], ``weight_scale``, perhaps ``weight_zero_point`` [out, groups].
"""

from typing import NamedTuple

import numpy as np

from checkpoints.hugging_face.packed_tensors import (
    AWQ_ORDER,
    PackedMatrix,
    StoredFormat,
    stored_format,
    unpack_words,
)
from checkpoints.hugging_face.quantization_config import Packing
from checkpoints.hugging_face.safetensors_files import DTYPES, SafetensorsFiles

_WEIGHT = ".weight"
_VALUES = {"awq": ".qweight", "gptq": ".qweight", "packed": ".weight_packed", "int8": _WEIGHT}
_INT32, _INT8, _INDEX = ("I32",), ("I8",), ("I32", "I64")


class _Part(NamedTuple):
    """A tensor that belongs to a matrix: its name, shape, dtypes it may have."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class PackedFiles:
    """The packed matrices of ``files``, by the names that they would have had as floats.

    ``packing`` None: there are none.
    """

    def __init__(self, files: SafetensorsFiles, packing: Packing | None) -> None:
        self._files, self._packing = files, packing
        self._shapes = files.shapes()

    def is_packed(self, name: str) -> bool:
        """Tells whether ``name``, which ends in ".weight", is packed: its integers are there."""
        if self._packing is None or not name.endswith(_WEIGHT):
            return False
        values = name.removesuffix(_WEIGHT) + _VALUES[self._packing.layout]
        is_there = values in self._shapes
        return is_there and (values != name or self._files.dtype(name) in _INT8)

    def check(self, name: str, shape: tuple[int, ...]) -> set[str]:
        """Returns the names of the tensors of a packed matrix [out, in].

        Raises ``ValueError`` naming one that is missing, or of another shape or type.
        """
        parts = self._parts(name, shape)
        for part in parts.values():
            found = self._shapes.get(part.name)
            if found is None:
                raise self._error(part.name, "is missing")
            # One for each output, without an axis for the one group.
            is_vector = part.shape == (*found, 1) and part.name.endswith(("_scale", "_point"))
            if found != part.shape and not is_vector:
                raise self._error(part.name, f"has shape {found}, the model needs {part.shape}")
            dtype = self._files.dtype(part.name)
            if dtype not in part.dtypes:
                supported = ", ".join(part.dtypes)
                raise self._error(part.name, f"has type {dtype}; supported are {supported}")
        if "shape" in parts:
            said = self._files.read_stored(parts["shape"].name)
            if tuple(said.tolist()) != shape:
                raise self._error(parts["shape"].name, f"is {said.tolist()}, not {list(shape)}")
        return {part.name for part in parts.values()}

    def is_empty_bias(self, name: str) -> bool:
        """Tells a bias of zeros of a packed matrix by its ``name``: some tools give one to each."""
        if not name.endswith(".bias") or not self.is_packed(name.removesuffix(".bias") + _WEIGHT):
            return False
        shape = self._shapes[name]
        if len(shape) != 1 or self._files.dtype(name) not in DTYPES:
            return False
        return not self._files.read(name, slice(0, shape[0])).any()

    def stored_format(self, name: str, shape: tuple[int, ...]) -> StoredFormat | None:
        """Returns the format of a packed matrix [out, in]; None where a group is in parts."""
        packing, parts = self._known(), self._parts(name, shape)
        if self._groups_of(parts, shape[1]) is not None:
            return None
        scales = "float16" if self._files.dtype(parts["scales"].name) == "F16" else "float32"
        has_zeros = "zeros" in parts and not packing.is_symmetric
        return stored_format(packing.bits, self._group(shape[1]), shape[1], has_zeros, scales)

    def read(self, name: str, shape: tuple[int, ...], rows: slice) -> PackedMatrix:
        """``rows`` of the outputs of a packed matrix [out, in].

        Raises ``ValueError`` for inputs in groups that there are not, and for zero points apart
        from the middle where the configuration says that there are none.
        """
        packing, parts = self._known(), self._parts(name, shape)
        stored = {role: self._files.read_stored(part.name) for role, part in parts.items()}
        zeros = self._zeros(stored["zeros"], shape[0]) if "zeros" in stored else None
        if zeros is not None and packing.is_symmetric:
            if (zeros != 1 << (packing.bits - 1)).any():
                raise self._error(
                    parts["zeros"].name, "has zero points, which quantization_config denies"
                )
            zeros = None
        scales = stored["scales"]
        scales = scales.T if packing.layout in ("awq", "gptq") else scales.reshape(shape[0], -1)
        return PackedMatrix(
            packing.bits,
            self._group(shape[1]),
            self._values(stored["values"], shape)[rows],
            scales[rows],
            None if zeros is None else zeros[rows],
            self._groups_of(parts, shape[1]),
        )

    def _known(self) -> Packing:
        assert self._packing is not None
        return self._packing

    def _group(self, num_inputs: int) -> int:
        return min(self._known().group or num_inputs, num_inputs)

    def _parts(self, name: str, shape: tuple[int, ...]) -> dict[str, _Part]:
        """The tensors of a matrix by what they are; those that it may have if they are there."""
        packing, stem, (outputs, inputs) = self._known(), name.removesuffix(_WEIGHT), shape
        groups = -(-inputs // self._group(inputs))

        def words(size: int) -> int:
            return -(-size * packing.bits // 32)

        values = stem + _VALUES[packing.layout]
        if packing.layout in ("awq", "gptq"):
            packed = (
                (inputs, words(outputs)) if packing.layout == "awq" else (words(inputs), outputs)
            )
            parts = {
                "values": _Part(values, packed, _INT32),
                "zeros": _Part(f"{stem}.qzeros", (groups, words(outputs)), _INT32),
                "scales": _Part(f"{stem}.scales", (groups, outputs), DTYPES),
            }
            if packing.layout == "gptq":
                parts["groups_of"] = _Part(f"{stem}.g_idx", (inputs,), _INDEX)
            return parts
        parts = {"scales": _Part(f"{stem}.weight_scale", (outputs, groups), DTYPES)}
        zeros, groups_of = f"{stem}.weight_zero_point", f"{stem}.weight_g_idx"
        if packing.layout == "packed":
            parts["values"] = _Part(values, (outputs, words(inputs)), _INT32)
            parts["shape"] = _Part(f"{stem}.weight_shape", (2,), _INDEX)
            optional = {"zeros": _Part(zeros, (words(outputs), groups), _INT32)}
        else:
            parts["values"] = _Part(values, shape, _INT8)
            optional = {"zeros": _Part(zeros, (outputs, groups), _INT8)}
        optional["groups_of"] = _Part(groups_of, (inputs,), _INDEX)
        return parts | {role: p for role, p in optional.items() if p.name in self._shapes}

    def _values(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 [out, in], from 0 on."""
        packing, (outputs, inputs) = self._known(), shape
        match packing.layout:
            case "awq":
                return unpack_words(stored, packing.bits, AWQ_ORDER)[:, :outputs].T
            case "gptq":
                return unpack_words(stored.T, packing.bits)[:, :inputs]
            case "packed":
                return unpack_words(stored, packing.bits)[:, :inputs]
            case "int8":
                return stored.view(np.uint8) ^ np.uint8(128)

    def _zeros(self, stored: np.ndarray, outputs: int) -> np.ndarray:
        """uint8 [out, groups], from 0 on as the values are."""
        packing = self._known()
        match packing.layout:
            case "awq":
                return unpack_words(stored, packing.bits, AWQ_ORDER)[:, :outputs].T
            case "gptq":
                # Modulo what the bits have: a zero point of 0 less 1 is all ones.
                mask = np.uint8((1 << packing.bits) - 1)
                zeros = unpack_words(stored, packing.bits)[:, :outputs].T
                return (zeros + np.uint8(packing.zero_offset)) & mask
            case "packed":
                words = stored.reshape(len(stored), -1)
                return unpack_words(words, packing.bits, axis=0)[:outputs]
            case "int8":
                return stored.reshape(outputs, -1).view(np.uint8) ^ np.uint8(128)

    def _groups_of(self, parts: dict[str, _Part], num_inputs: int) -> np.ndarray | None:
        """The group of each input, None where they are neighbours in order."""
        if "groups_of" not in parts:
            return None
        name, group = parts["groups_of"].name, self._group(num_inputs)
        groups_of = self._files.read_stored(name)
        in_order = np.arange(num_inputs) // group
        if np.array_equal(groups_of, in_order):
            return None
        if groups_of.min() < 0 or groups_of.max() > in_order[-1]:
            raise self._error(name, f"has groups outside [0, {in_order[-1]}]")
        return groups_of

    def _error(self, name: str, what: str) -> ValueError:
        return ValueError(f"{self._files.folder}: tensor {name!r} {what}")
