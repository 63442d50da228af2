"""The integers of GGML's types stand for the numbers that dequantization gives."""

import numpy as np
import pytest

from checkpoints.gguf.blocks import TENSOR_TYPES, TensorType, dequantize_rows
from checkpoints.gguf.integers import STORED_TYPES, split_blocks

TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}


def draw(kind: TensorType) -> np.ndarray:
    """Rows of any bytes, but for scales, which are of ordinary size."""
    random = np.random.RandomState(3)
    data = random.randint(256, size=(12, 4, kind.block_bytes)).astype(np.uint8)
    # Wherever a type has its float16 numbers: an exponent that is neither infinite nor tiny.
    places = {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0]}.get(kind.name, [0, 2])
    for place in places:
        halves = (random.random_sample((12, 4)) * 4 - 2).astype(np.float16)
        data[:, :, place : place + 2] = halves[:, :, None].view(np.uint8)
    return data.reshape(12, -1)


@pytest.mark.parametrize("name", STORED_TYPES)
def test_they_stand_for_the_same_numbers(name: str) -> None:
    kind, form = TYPES[name], STORED_TYPES[name].form
    data = draw(kind)
    parts, error = split_blocks(data, kind)
    wanted = dequantize_rows(data, kind)
    assert parts.values.dtype == np.int8
    assert parts.values.shape == wanted.shape
    assert parts.scales.shape == (12, wanted.shape[1] // form.group)
    assert parts.scales.dtype == np.float16
    assert (parts.minimums is None) == (form.minimums is None)
    if form.bits == 4:
        low = 0 if form.minimums else -8
        assert parts.values.min() == low
        assert parts.values.max() == low + 15
    found = parts.values * np.repeat(parts.scales.astype(np.float32), form.group, axis=1)
    if parts.minimums is not None:
        found = found + np.repeat(parts.minimums.astype(np.float32), form.group, axis=1)
    if STORED_TYPES[name].rounds:
        assert 0 < error <= 2**-11 * 1.01
        assert np.abs(found - wanted).max() <= 2**-10 * np.abs(wanted).max()
    else:
        assert error == 0
        np.testing.assert_array_equal(found, wanted)


def test_every_quantized_type_can_be_stored() -> None:
    floats = {"F32", "F16", "BF16"}
    assert set(STORED_TYPES) == set(TYPES) - floats
