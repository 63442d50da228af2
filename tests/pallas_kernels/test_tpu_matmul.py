"""Backends of products with integers over one list of cases; the TPU's kernels interpreted."""

import dataclasses
import functools
import inspect
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sharding import make_mesh
from pallas_kernels.quantized_matmul import (
    grouped_matmul,
    int8_matmul,
    tpu,
    tpu_blocks,
    tpu_grouped,
)
from tests.pallas_kernels.cases import SUBJECT
from tests.pallas_kernels.matmul_cases import (
    GROUPED_CASES,
    INT8_CASES,
    GroupedCase,
    Int8Case,
    check,
)
from tests.pallas_kernels.test_tpu_attention import interpreted
from tests.thorough import thorough_beyond

CASES = (*INT8_CASES, *GROUPED_CASES)
TAKEN = [case for case in CASES if case.declined is None]
DECLINED = [case for case in CASES if case.declined is not None]
INT8 = {case.name: case for case in INT8_CASES}
GROUPED = {case.name: case for case in GROUPED_CASES}


def name_of(case: Int8Case | GroupedCase) -> str:
    return f"{type(case).__name__}-{case.name}"


def run_kernel(case: Int8Case | GroupedCase, arrays: tuple[Any, ...]) -> np.ndarray:
    with interpreted("on_wait"):
        return case.multiply(arrays, "tpu")


@pytest.mark.parametrize("case", thorough_beyond(CASES[::3], CASES, SUBJECT), ids=name_of)
def test_xla_equals_the_definition(case: Int8Case | GroupedCase) -> None:
    arrays = case.draw()
    check(case, arrays, case.multiply(arrays, "xla"))


@pytest.mark.parametrize("case", thorough_beyond(TAKEN[::3], TAKEN, SUBJECT), ids=name_of)
def test_kernel_equals_the_definition(case: Int8Case | GroupedCase) -> None:
    arrays = case.draw()
    check(case, arrays, run_kernel(case, arrays))


@pytest.mark.parametrize("case", DECLINED, ids=name_of)
def test_kernel_declines_and_xla_runs(case: Int8Case | GroupedCase) -> None:
    arrays = case.draw()
    with pytest.raises(NotImplementedError, match=case.declined):
        case.multiply(arrays, "tpu")
    check(case, arrays, case.multiply(arrays, None))


@pytest.mark.parametrize(
    "case",
    thorough_beyond(
        [GROUPED["q4_1"]],
        [INT8["groups_of_64"], INT8["axes_merged"], GROUPED["q4_1"]],
        SUBJECT,
    ),
    ids=name_of,
)
def test_blocks_of_rows_and_an_odd_number_of_outputs(
    case: Int8Case | GroupedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of outputs on two cores, and rows in blocks of which the last is not full."""
    monkeypatch.setattr(tpu_blocks, "MAX_ROWS", 32)
    monkeypatch.setattr(tpu_blocks, "MAX_OUTPUTS", 128)
    outputs = (3, 128) if isinstance(case, GroupedCase) else (384,)
    case = dataclasses.replace(case, rows=72, outputs=outputs)
    arrays = case.draw()
    check(case, arrays, run_kernel(case, arrays))


@pytest.mark.parametrize("group", thorough_beyond([32], [16, 32, 64, 128], SUBJECT))
def test_scaled_in_bfloat16(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on TPUs that calculate with it: weights and their scales are rounded to it."""
    monkeypatch.setattr(tpu, "has_bfloat16_arithmetic", lambda: True)
    case = GroupedCase("", 8, 384, (2, 256), 4, group, dtype="bfloat16")
    arrays = case.draw()
    found, wanted = run_kernel(case, arrays), case.multiply(arrays, "reference")
    assert (np.abs(found - wanted) <= 2.0**-8 * case.sizes(arrays)).all()
    x, values, scales, _ = arrays
    rounded = scales.astype(jnp.bfloat16).astype(jnp.float32)
    of_rounded = case.multiply((x, values, rounded, None), "reference")
    assert (np.abs(found - of_rounded) <= 2.0**-9 * case.sizes(arrays)).all()


@pytest.mark.parametrize("group", [None, 64])
def test_a_row_of_8_bits_does_not_depend_on_its_neighbours(group: int | None) -> None:
    case = Int8Case("", 40, (256,), (256,), 8, group)
    x, values, scales = case.draw()
    whole = run_kernel(case, (x, values, scales))
    for rows in (slice(0, 8), slice(37, 38)):
        part = run_kernel(case, (x[rows], values, scales))
        np.testing.assert_array_equal(part, whole[rows])


# Fault, what the kernel says, what it would say, and the case that must notice.
FAULTS = (
    ("scale of the wrong group", "row = first + begin * 8", "row = first + 0", "q4_0"),
    (
        "scale of the wrong chunk",
        "row = pl.ds(index * (form.chunk // form.group) + place, 1)",
        "row = pl.ds(place, 1)",
        "q8_0_chunks",
    ),
    ("nibbles swapped", "(nibble & 1) * half", "(1 - (nibble & 1)) * half", "q4_0"),
    ("no zero point", "words ^= MINUS_8", "pass", "q4_0"),
    ("no minimum", "* block_scales + block_minimums", "* block_scales", "q4_1"),
    ("subnormals are zero", "magnitude.astype(jnp.float32) * 2.0**-24", "0.0", "q4_0"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].replace(" ", "_"))
@pytest.mark.thorough("faults planted in kernels")
def test_planted_faults_are_noticed(
    fault: tuple[str, str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, right, wrong, name = fault
    source = inspect.getsource(tpu_grouped)
    assert source.count(right) == 1, "the kernel has changed: plant the fault anew"
    faulty = types.ModuleType(tpu_grouped.__name__)
    monkeypatch.setitem(sys.modules, tpu_grouped.__name__, faulty)
    exec(compile(source.replace(right, wrong), "faulty", "exec"), faulty.__dict__)
    monkeypatch.setattr(tpu, "tpu_grouped", faulty)
    case = GROUPED[name]
    arrays = case.draw()
    found = run_kernel(case, arrays)
    with pytest.raises(AssertionError):
        check(case, arrays, found)


def test_float16_of_all_bits() -> None:
    """Every float16 there is, subnormals, infinities and both zeros included."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    wanted = bits.view(np.float16).astype(np.float32)
    found = np.asarray(tpu_grouped.float32_of_bits(jnp.asarray(bits)))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


def test_rows_and_scales_of_other_dtypes_are_declined() -> None:
    x, values, scales, _ = GROUPED["q4_0"].draw()
    with pytest.raises(NotImplementedError, match="rows are float16"):
        grouped_matmul(x.astype(jnp.float16), values, scales, backend="tpu")
    with pytest.raises(NotImplementedError, match="scales or minimums are bfloat16"):
        grouped_matmul(x, values, scales.astype(jnp.bfloat16), backend="tpu")


def test_what_vector_memory_cannot_hold_is_declined() -> None:
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((8, 1 << 20), jnp.bfloat16),
            ((128, 1 << 20), jnp.int8),
            ((128,), jnp.float32),
        )
    ]
    operation = functools.partial(int8_matmul, activation_bits=16, backend="tpu")
    with pytest.raises(NotImplementedError, match="of vector memory"):
        jax.eval_shape(operation, *arrays)


def lowered(platform: str, **context: Any) -> str:
    """The program of a product that the kernel takes, as text before any compiler's work."""
    arrays = INT8["one_row"].draw()
    product = jax.jit(functools.partial(int8_matmul, activation_bits=16, **context))
    return product.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def test_each_platform_gets_its_own() -> None:
    """Also where nothing says for which platform is traced, as on a machine without TPUs."""
    assert "tpu_custom_call" in lowered("tpu")
    assert "tpu_custom_call" not in lowered("cpu")
    assert "tpu_custom_call" not in lowered("cuda")
    mesh = make_mesh(jax.devices("cpu")[:1])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as programs of the engine are
        assert lowered("cpu") == lowered("cpu", backend="xla")
