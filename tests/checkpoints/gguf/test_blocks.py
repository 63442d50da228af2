import gguf
import numpy as np
import pytest

from checkpoints.gguf.blocks import (
    TENSOR_TYPES,
    UNSUPPORTED_TENSOR_TYPES,
    aligned_empty,
    dequantize_columns,
    dequantize_rows,
)

# What gguf-py can also quantize into; of the others, any bytes are a sound block.
QUANTIZABLE = [n for n, kind in TENSOR_TYPES.items() if not kind.name.endswith("_K")]


@pytest.mark.parametrize("number", QUANTIZABLE, ids=lambda number: TENSOR_TYPES[number].name)
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (40, 320), (700, 512)])
def test_numbers_are_exactly_those_of_gguf_py(number: int, shape: tuple[int, int]) -> None:
    kind = gguf.GGMLQuantizationType(number)
    array = np.random.RandomState(number).standard_normal(shape).astype(np.float32)
    data = gguf.quants.quantize(array, kind).view(np.uint8).reshape(shape[0], -1)
    expected = gguf.quants.dequantize(data, kind)
    rows = dequantize_rows(data, TENSOR_TYPES[number])
    columns = dequantize_columns(data, TENSOR_TYPES[number])
    assert rows.dtype == columns.dtype == np.float32
    assert columns.flags.c_contiguous
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(columns, expected.T)


@pytest.mark.parametrize("number", TENSOR_TYPES, ids=lambda number: TENSOR_TYPES[number].name)
def test_any_bytes_give_what_gguf_py_gives(number: int) -> None:
    kind = TENSOR_TYPES[number]
    shape = (64, 8 * kind.block_bytes)
    data = np.random.RandomState(1).randint(256, size=shape).astype(np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(number))
    np.testing.assert_array_equal(dequantize_rows(data, kind), expected)
    np.testing.assert_array_equal(dequantize_columns(data, kind), expected.T)


def test_names_and_sizes_are_ggml_s() -> None:
    for number, kind in TENSOR_TYPES.items():
        known = gguf.GGMLQuantizationType(number)
        assert known.name == kind.name
        assert gguf.GGML_QUANT_SIZES[known] == (kind.block_elements, kind.block_bytes)
    for number, name in UNSUPPORTED_TENSOR_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name


def test_arrays_lie_where_jax_need_not_copy_them() -> None:
    for size in (1, 3, 1000, 1 << 20):
        array = aligned_empty((size, 2), np.float32)
        assert array.ctypes.data % 64 == 0
        assert array.shape == (size, 2)
