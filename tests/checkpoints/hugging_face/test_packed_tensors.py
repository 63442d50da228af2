"""Words against loops, and packed matrices against the numbers that libraries read from them."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints.hugging_face.packed_files import PackedFiles
from checkpoints.hugging_face.packed_tensors import (
    AWQ_ORDER,
    PackedMatrix,
    stored_format,
    unpack_words,
)
from checkpoints.hugging_face.quantization_config import read_packing
from checkpoints.hugging_face.safetensors_files import SafetensorsFiles
from jaxinfer.weights import GroupedFormat, Int8Format, Integers

REFERENCE = Path(__file__).parents[2] / "data" / "packed_reference.json"
CASES: dict[str, dict[str, Any]] = json.loads(REFERENCE.read_text())["cases"]


def decoded(array: dict[str, Any]) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(array["base64"]), array["dtype"])
    return data.reshape(array["shape"])


def meant(parts: Integers, num_inputs: int) -> np.ndarray:
    """The numbers [out, in] of integers, in float64."""
    group = num_inputs // parts.scales.shape[1]
    numbers = parts.values * np.repeat(parts.scales.astype(np.float64), group, axis=1)
    return numbers if parts.minimums is None else numbers + np.repeat(parts.minimums, group, axis=1)


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_library(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    tensors = {f"m.{part}": decoded(array) for part, array in case["tensors"].items()}
    save_file(tensors, tmp_path / "model.safetensors")
    packing = read_packing({"quantization_config": case["config"]})
    packed = PackedFiles(SafetensorsFiles(tmp_path), packing)
    numbers = decoded(case["numbers"])
    assert packed.is_packed("m.weight")
    assert packed.check("m.weight", numbers.shape) == tensors.keys()
    matrix = packed.read("m.weight", numbers.shape, slice(None))
    np.testing.assert_array_equal(matrix.dequantized(), numbers)
    form = packed.stored_format("m.weight", numbers.shape)
    assert form is not None
    np.testing.assert_array_equal(meant(matrix.integers(form), numbers.shape[1]), numbers)
    some = packed.read("m.weight", numbers.shape, slice(3, 9))
    np.testing.assert_array_equal(some.dequantized(), numbers[3:9])


@pytest.mark.parametrize(("bits", "is_awq"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize("axis", [0, 1])
def test_words(bits: int, is_awq: bool, axis: int) -> None:
    words = np.random.RandomState(bits).randint(-(1 << 31), 1 << 31, (6, 10)).astype(np.int32)
    unpacked = unpack_words(words, bits, AWQ_ORDER if is_awq else None, axis)
    count = 32 // bits
    expected = np.zeros((6 * count, 10) if axis == 0 else (6, 10 * count), np.uint8)
    for row in range(6):
        for column in range(10):
            word = int(words[row, column]) % (1 << 32)
            for place in range(count):
                number = (0, 2, 4, 6, 1, 3, 5, 7)[place] if is_awq else place
                value = (word >> (bits * place)) % (1 << bits)
                if axis == 0:
                    expected[row * count + number, column] = value
                else:
                    expected[row, column * count + number] = value
    np.testing.assert_array_equal(unpacked, expected, strict=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("group", [8, 24, 40, 96])
def test_every_number_of_a_matrix(bits: int, has_zeros: bool, group: int) -> None:
    """w = (q - z) s, one by one; integers, where all levels and zero points occur, the same."""
    random, levels, (outputs, inputs) = np.random.RandomState(group), 1 << bits, (20, 96)
    values = random.randint(levels, size=(outputs, inputs)).astype(np.uint8)
    groups = -(-inputs // group)
    zeros = random.randint(levels, size=(outputs, groups)).astype(np.uint8)
    zeros[:2, 0] = 0, levels - 1
    values[:2, :2] = 0, levels - 1
    scales = random.uniform(1e-3, 1, (outputs, groups)).astype(np.float16)
    matrix = PackedMatrix(bits, group, values, scales, zeros if has_zeros else None)
    expected = np.zeros((outputs, inputs))
    for out in range(outputs):
        for i in range(inputs):
            zero = int(zeros[out, i // group]) if has_zeros else levels // 2
            expected[out, i] = (int(values[out, i]) - zero) * float(scales[out, i // group])
    np.testing.assert_array_equal(matrix.dequantized(), expected)
    form = stored_format(bits, group, inputs, has_zeros, "float16")
    assert form is not None
    parts = matrix.integers(form)
    assert parts.values.dtype == np.int8
    assert parts.values.min() == (0 if bits == 4 and has_zeros else -levels // 2)
    np.testing.assert_array_equal(meant(parts, inputs), expected)


def test_formats() -> None:
    assert stored_format(4, 128, 4096, True, "float16") == GroupedFormat(4, 128, "float32")
    assert stored_format(4, 64, 4096, False, "float32") == GroupedFormat(4, 64, None, "float32")
    assert stored_format(4, 4096, 4096, False, "float16") == GroupedFormat(4, 128)
    assert stored_format(4, 11008, 11008, False, "float16") == GroupedFormat(4, 128)
    assert stored_format(8, 4096, 4096, False, "float32") == Int8Format()
    assert stored_format(8, 4096, 4096, True, "float32") == GroupedFormat(
        8, 128, "float32", "float32"
    )
    assert stored_format(4, 96, 4096, False, "float16") == GroupedFormat(4, 32)
    assert stored_format(4, 12, 4096, False, "float16") is None


def test_a_stored_zero_point_of_all_ones_is_none(tmp_path: Path) -> None:
    """GPTQ stores z - 1: of 0, in 4 bits, 15."""
    case = CASES["gptq asymmetric"]
    tensors = {f"m.{part}": decoded(array).copy() for part, array in case["tensors"].items()}
    tensors["m.qzeros"][:] = -1
    save_file(tensors, tmp_path / "model.safetensors")
    packing = read_packing({"quantization_config": case["config"]})
    packed = PackedFiles(SafetensorsFiles(tmp_path), packing)
    zeros = packed.read("m.weight", decoded(case["numbers"]).shape, slice(None)).zeros
    assert zeros is not None
    assert not zeros.any()
