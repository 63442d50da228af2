"""The TPU kernel, interpreted on the CPU: copies are asynchronous, buffers begin as NaN, and races
between copies are found. What the TPU itself rounds or miscompiles is not seen here.
"""

import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import (
    packed_pages,
    quantized_rows,
    tpu,
    tpu_kernel,
    tpu_softmax,
    tpu_tile,
)
from tests.conftest import ManyDevices
from tests.pallas_kernels.cases import (
    CASES,
    FEW,
    SUBJECT,
    AttentionCase,
    AttentionInputs,
    build,
)
from tests.pallas_kernels.test_ragged_paged_attention import expected
from tests.thorough import thorough_beyond

BY_NAME = {case.name: case for case in CASES if case.page_size != 1}
# Blocks of few tokens, so that short sequences have several of them.
BLOCK_TOKENS = 32

Copies = Literal["on_wait", "eager"]


@contextmanager
def interpreted(copies: Copies) -> Iterator[None]:
    """Kernels run in the interpreter, and a race between copies fails the test.

    ``copies`` move their bytes as late as they may, when they are waited for, or as early.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    parameters = pltpu.InterpretParams(detect_races=True, dma_execution_mode=copies)
    try:
        with pltpu.force_tpu_interpret_mode(parameters):
            yield
        races: Any = interpreter.races
        assert not races.races_found, "a copy reads what another is writing"
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def run(
    case: AttentionCase,
    arrays: Any,
    inputs: AttentionInputs,
    block_tokens: int = BLOCK_TOKENS,
    copies: Copies = "on_wait",
) -> tuple[np.ndarray, Any]:
    operation = functools.partial(
        tpu.ragged_paged_attention,
        scale=case.head_dim**-0.5,
        sliding_window=case.sliding_window,
        logit_soft_cap=case.logit_soft_cap,
        kv_block_tokens=block_tokens,
    )
    with interpreted(copies):
        outputs, pages = jax.jit(operation)(*arrays, inputs.batch)
        outputs = np.asarray(outputs)
    return outputs, pages


def check(
    case: AttentionCase, inputs: AttentionInputs, outputs: np.ndarray, pages: Any, tolerance: float
) -> None:
    """Outputs of real rows, all pages, and that padding rows are finite."""
    wanted, *wanted_pages = expected(case, inputs)
    rows = [row for _, _, row in inputs.rows]
    np.testing.assert_allclose(outputs[rows], wanted[rows], atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(tpu.to_logical(pages, case.head_dim), wanted_pages, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs.astype(np.float32))
    assert np.isfinite(outputs).all(), "padding rows must stay finite"


@pytest.mark.parametrize("name", thorough_beyond(FEW, BY_NAME, SUBJECT))
def test_case(name: str) -> None:
    case = BY_NAME[name]
    inputs = build(case)
    outputs, pages = run(case, inputs.arrays("tpu"), inputs)
    check(case, inputs, outputs, pages, tolerance=3e-6)


@pytest.mark.parametrize(
    "name",
    thorough_beyond(
        ["mixed"], ["ragged_chunk", "mixed", "verify_mixed", "chunk_across_blocks"], SUBJECT
    ),
)
def test_copies_that_do_not_wait(name: str) -> None:
    """A row fetched too early is read before it is written."""
    case = BY_NAME[name]
    inputs = build(case)
    outputs, pages = run(case, inputs.arrays("tpu"), inputs, copies="eager")
    check(case, inputs, outputs, pages, tolerance=3e-6)


QUANTIZED = (
    AttentionCase("mixed", decodes=(5, 63, 140), chunks=((0, 23), (120, 16)), page_size=128),
    AttentionCase("verify", decodes=(125, 30), decode_rows=5, head_dim=80, page_size=128),
    AttentionCase("window", decodes=(200,), chunks=((250, 30),), sliding_window=9, page_size=128),
)


@pytest.mark.parametrize("dtype", thorough_beyond(["int8"], ["int8", "uint8"], SUBJECT))
@pytest.mark.parametrize(
    "case", thorough_beyond(QUANTIZED[:1], QUANTIZED, SUBJECT), ids=lambda case: case.name
)
def test_quantized_pages(case: AttentionCase, dtype: str) -> None:
    """The pages are the truth, new rows included: beyond their rounding no error."""
    inputs = build(case)
    queries, keys, values, _ = inputs.arrays("tpu")
    pages = tpu.from_logical(jnp.asarray(inputs.key_pages), jnp.asarray(inputs.value_pages), dtype)
    assert pages.pages.dtype == jnp.dtype(dtype)
    key_pages, value_pages = tpu.to_logical(pages, case.head_dim)
    rounded = [
        quantized_rows.dequantize_rows(*quantized_rows.quantize_rows(rows, dtype))
        for rows in (keys, values)
    ]
    truth = dataclasses.replace(
        inputs,
        keys=np.asarray(rounded[0]),
        values=np.asarray(rounded[1]),
        key_pages=np.asarray(key_pages),
        value_pages=np.asarray(value_pages),
    )
    outputs, pages = run(case, (queries, keys, values, pages), inputs)
    check(case, truth, outputs, pages, tolerance=3e-6)


def test_quantization_rounds_to_a_part_of_the_largest() -> None:
    rows = jnp.asarray(np.random.RandomState(0).standard_normal((7, 3, 64)), jnp.float32)
    rows = rows.at[0].set(0)
    largest = np.abs(np.asarray(rows)).max(-1, keepdims=True)
    # int8 has steps of 1/127 of the largest value, float8 (e4m3) 3 bits behind the first one.
    for dtype, error in (("int8", 0.5 / 127), ("uint8", 2.0**-4)):
        values, scales = quantized_rows.quantize_rows(rows, dtype)
        assert values.dtype == jnp.dtype(dtype)
        again = np.asarray(quantized_rows.dequantize_rows(values, scales))
        assert (np.abs(again - rows) <= 1.001 * error * largest).all()
        np.testing.assert_allclose(np.abs(again).max(-1, keepdims=True), largest, rtol=1e-6)


def test_bfloat16_stays_near_float32() -> None:
    case = BY_NAME["verify_mixed"]
    inputs = build(case)
    outputs, pages = run(case, inputs.arrays("tpu", jnp.bfloat16), inputs)
    assert outputs.dtype == pages.pages.dtype == jnp.bfloat16
    wanted, *_ = expected(case, inputs)
    rows = [row for _, _, row in inputs.rows]
    outputs = outputs.astype(np.float32)
    np.testing.assert_allclose(outputs[rows], wanted[rows], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("block_tokens", thorough_beyond([], [16, 64, 512], SUBJECT))
def test_block_sizes_change_rounding_only(block_tokens: int) -> None:
    case = BY_NAME["mixed"]
    inputs = build(case)
    outputs, pages = run(case, inputs.arrays("tpu"), inputs, block_tokens)
    check(case, inputs, outputs, pages, tolerance=3e-6)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """The same bits alone, among others, and behind padding."""
    together = dataclasses.replace(BY_NAME["mixed"], padding_decodes=2)
    inputs = build(together)
    outputs, _ = run(together, inputs.arrays("tpu"), inputs)
    queries, keys, values, pages = inputs.arrays("tpu")
    for decode in range(3):
        decodes = jax.tree.map(lambda x, at=decode: x[at : at + 1], inputs.batch.decodes)
        chunks = jax.tree.map(lambda x: x[:0], inputs.batch.chunks)
        batch = dataclasses.replace(inputs.batch, decodes=decodes, chunks=chunks)
        arrays = *(x[decode : decode + 1] for x in (queries, keys, values)), pages
        alone, _ = run(together, arrays, dataclasses.replace(inputs, batch=batch))
        np.testing.assert_array_equal(alone[0], outputs[decode])


# Fault, what the kernel says, what it would say, and the case that must notice.
EARLY = {"fetched while written"}
FAULTS = (
    ("no wait for a block", '_fetch(tile, block, slot, kv_pages, scratch, "wait")', "", "mixed"),
    ("no wait for writes", "_wait_for_writes(tile, kv_pages, scratch)", "", "ragged_chunk"),
    ("fetched while written", "(following.num_rows > 0) & is_written", "True", "ragged_chunk"),
    ("mask one too late", "key_positions <= positions", "key_positions <= positions + 1", "mixed"),
    ("mask one too early", "key_positions <= positions", "key_positions < positions", "mixed"),
    ("window one too wide", "> positions - shape", ">= positions - shape", "window_below_page"),
    ("page one too early", "sequence + index]", "sequence + jnp.maximum(index - 1, 0)]", "mixed"),
    ("not cleared", "_clear_behind_end(tile, block, fetched)", "", "one_decode"),
    ("rows misplaced", "tile.start - tile.aligned_start, 1", "0, 1", "unaligned_chunk"),
    ("padding kept", "positions < self.kv_len", "positions < self.kv_len + 1", "ragged_chunk"),
    ("not corrected", "denominator[...] * correction", "denominator[...]", "block_border"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].replace(" ", "_"))
@pytest.mark.thorough("faults planted in kernels")
def test_planted_faults_are_noticed(
    fault: tuple[str, str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A faulty kernel fails the case that a right one passes: the list can see these faults."""
    what, right, wrong, name = fault
    modules = (tpu_tile, tpu_softmax, tpu_kernel)  # in the order in which they import each other
    sources = [inspect.getsource(module) for module in modules]
    found = sum(source.count(right) for source in sources)
    assert found == 1, "the kernel has changed: plant the fault anew"
    for module, source in zip(modules, sources, strict=True):
        faulty = types.ModuleType(module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, faulty)
        exec(compile(source.replace(right, wrong or "pass"), "faulty", "exec"), faulty.__dict__)
        for part in ("attend_tile", "TileShape", "Scratch"):
            if hasattr(faulty, part):
                monkeypatch.setattr(tpu, part, getattr(faulty, part))
    case = BY_NAME[name]
    inputs = build(case)
    copies: Copies = "eager" if what in EARLY else "on_wait"

    def run_case() -> None:
        outputs, pages = run(case, inputs.arrays("tpu"), inputs, copies=copies)
        check(case, inputs, outputs, pages, tolerance=3e-6)

    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        run_case()


def test_what_the_kernel_declines() -> None:
    inputs = build(BY_NAME["mixed"])
    arrays = inputs.arrays("tpu")
    options = {"scale": 1.0, "sliding_window": None, "logit_soft_cap": None}

    def declined(match: str, *arrays: Any, batch: Any = inputs.batch) -> None:
        with pytest.raises(NotImplementedError, match=match):
            functools.partial(tpu.ragged_paged_attention, *arrays)(batch, **options)

    declined("pages are LogicalKVPages", *inputs.arrays("reference"))
    declined("queries are float16", arrays[0].astype(jnp.float16), *arrays[1:])
    wide = jax.ShapeDtypeStruct((512, 1024), jnp.int32)
    declined("page table", *arrays, batch=dataclasses.replace(inputs.batch, page_table=wide))
    with pytest.raises(NotImplementedError, match="pages are float16"):
        tpu.abstract_kv_pages(4, 16, 2, 64, jnp.float16, "")
    with pytest.raises(NotImplementedError, match="16 tokens is no multiple of 128, for int8"):
        tpu.abstract_kv_pages(4, 16, 2, 64, jnp.int8, "")


def attend_on_two_devices(name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """A case with the kernel on each of two devices, for its half of the kv heads."""
    from jaxinfer.models.layers import split_over_kv_heads
    from jaxinfer.sharding import make_mesh

    case = BY_NAME[name]
    inputs = build(case)
    operation = functools.partial(
        tpu.ragged_paged_attention,
        scale=case.head_dim**-0.5,
        sliding_window=case.sliding_window,
        logit_soft_cap=case.logit_soft_cap,
        kv_block_tokens=BLOCK_TOKENS,
    )
    split = split_over_kv_heads(operation, make_mesh(jax.devices("cpu")[:2]))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        outputs, pages = jax.jit(split)(*inputs.arrays("tpu"), inputs.batch)
        jax.block_until_ready(outputs)
    return np.asarray(outputs), [np.asarray(array) for array in jax.tree.leaves(pages)]


@pytest.mark.parametrize(
    "name", thorough_beyond(["wide_heads_4_2"], ["heads_12_2", "wide_heads_4_2"], SUBJECT)
)
def test_tensor_parallel_halves(name: str, many_devices: ManyDevices) -> None:
    outputs, (pages,) = many_devices(attend_on_two_devices, name)
    case = BY_NAME[name]
    inputs = build(case)
    check(case, inputs, outputs, packed_pages.PackedKVPages(jnp.asarray(pages)), tolerance=3e-6)
