"""Integers that other libraries packed into words, and the numbers they stand for.

A matrix is w = (q - z) s: integers q from 0 on, with a zero point z and a scale s for each group of
inputs of an output. AWQ (Lin et al. 2023, section 3; words as AutoAWQ's ``WQLinear_GEMM`` packs
them), GPTQ (Frantar et al. 2022, section 3; words as AutoGPTQ's ``QuantLinear``) and
compressed-tensors (``pack_to_int32``) differ in where they put them. Numpy alone.
"""

import math
from dataclasses import dataclass

import numpy as np

from jaxinfer.weights import GroupedFormat, Int8Format, Integers
from jaxinfer.weights.integers import GROUPS

StoredFormat = Int8Format | GroupedFormat

# The place of bits in a word -> which of eight outputs stands there (AutoAWQ's ``order_map``).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(
    words: np.ndarray, bits: int, order: tuple[int, ...] | None = None, axis: int = -1
) -> np.ndarray:
    """uint8 numbers of int32 ``words``, ``32 / bits`` times as many along ``axis``.

    The lowest ``bits`` come first, or as ``order`` says: what is at place i is number ``order[i]``.
    """
    unsigned = np.moveaxis(words.view(np.uint32), axis, -1)
    count, mask = 32 // bits, np.uint32((1 << bits) - 1)
    numbers = np.empty((*unsigned.shape, count), np.uint8)
    for place, number in enumerate(order or range(count)):
        numbers[..., number] = (unsigned >> np.uint32(bits * place)) & mask
    return np.moveaxis(numbers.reshape(*unsigned.shape[:-1], -1), -1, axis)


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [out, in], unpacked: ``(values - zeros) * scales``.

    ``values`` uint8 [out, in] of ``bits``; ``zeros`` uint8 [out, groups], None where all are the
    middle, ``2**(bits - 1)``; ``scales`` [out, groups] of floats. ``groups_of`` [in]: the group of
    each input; None where they are ``group`` neighbours each, the last perhaps fewer.
    """

    bits: int
    group: int
    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    groups_of: np.ndarray | None = None

    def dequantized(self) -> np.ndarray:
        """The float32 matrix [out, in]: exact where scales are of 16 bits."""
        index, (outputs, inputs) = self.groups_of, self.values.shape
        numbers = self.values.astype(np.float32, order="C")
        groups, has_axis = numbers, index is None and inputs % self.group == 0
        if has_axis:  # nothing is repeated in memory
            groups = numbers.reshape(outputs, -1, self.group)
        elif index is None:
            index = np.arange(inputs) // self.group

        def spread(part: np.ndarray) -> np.ndarray:
            return part[..., None] if has_axis else part[:, index]

        groups -= np.float32(1 << (self.bits - 1)) if self.zeros is None else spread(self.zeros)
        with np.errstate(all="ignore"):  # of a damaged file: found by those who look for these
            groups *= spread(self.scales.astype(np.float32))
        return numbers

    def integers(self, form: StoredFormat) -> Integers:
        """Returns the same numbers in ``form``, which is ``stored_format`` of this matrix."""
        values, scales, minimums = self.values, self.scales, None
        # Of 4 bits with minimums the integers stay 0..15; all others are signed.
        shift = 0 if self.bits == 4 and self.zeros is not None else 1 << (self.bits - 1)
        signed = (values - np.uint8(shift)).view(np.int8)  # modulo 256: what int8 has
        if isinstance(form, Int8Format):
            return Integers(signed, scales.astype(np.float32))
        if self.zeros is not None:
            steps = np.float32(shift) - self.zeros.astype(np.float32)
            with np.errstate(all="ignore"):
                minimums = steps * scales.astype(np.float32)
            minimums = self._repeated(minimums, form)
        return Integers(signed, self._repeated(scales.astype(form.scales), form), minimums)

    def _repeated(self, numbers: np.ndarray, form: GroupedFormat) -> np.ndarray:
        """[out, groups] -> [out, groups of ``form``]."""
        whole = np.repeat(numbers, self.group // form.group, axis=1)
        return whole[:, : self.values.shape[1] // form.group]


def stored_format(
    bits: int, group: int, num_inputs: int, has_zeros: bool, scales: str
) -> StoredFormat | None:
    """Returns the format of integers of ``bits`` in groups of neighbours; None where none has room.

    ``scales``: their dtype, float16 or float32.
    """
    if bits == 8 and group >= num_inputs and not has_zeros:
        return Int8Format()
    divisor = math.gcd(group, num_inputs)
    fitting = [size for size in GROUPS if divisor % size == 0]
    if not fitting:
        return None
    # Zero points times scales: of 16 bits, exact in float32.
    return GroupedFormat(bits, max(fitting), "float32" if has_zeros else None, scales)
