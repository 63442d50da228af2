"""Every backend against loops over plain NumPy arrays, case by case."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import dispatch
from pallas_kernels.ragged_paged_attention import (
    IMPLEMENTATIONS,
    QueryTiles,
    RaggedBatch,
    ragged_paged_attention,
)
from pallas_kernels.ragged_paged_attention.quantized_rows import dequantize_rows, quantize_rows
from tests.pallas_kernels.cases import (
    CASES,
    FEW,
    SUBJECT,
    AttentionCase,
    AttentionInputs,
    build,
)
from tests.thorough import thorough_beyond

BY_NAME = {case.name: case for case in CASES}


def run(
    case: AttentionCase, inputs: AttentionInputs, backend: str, arrays: tuple[Any, ...] = ()
) -> tuple[np.ndarray, ...]:
    """Outputs, and logical key and value pages; ``arrays`` other than those of ``inputs``."""
    operation = functools.partial(
        ragged_paged_attention,
        scale=case.head_dim**-0.5,
        sliding_window=case.sliding_window,
        logit_soft_cap=case.logit_soft_cap,
    )
    arrays = arrays or inputs.arrays(backend)
    outputs, kv_pages = jax.jit(operation)(*arrays, inputs.batch)
    pages = IMPLEMENTATIONS[backend].to_logical(kv_pages, case.head_dim)
    return np.asarray(outputs), *(np.asarray(array) for array in pages)


def expected(case: AttentionCase, inputs: AttentionInputs) -> tuple[np.ndarray, ...]:
    """Attention as loops over rows and heads in float64, written without any of our code."""
    table, size = np.asarray(inputs.batch.page_table), case.page_size
    key_pages = inputs.key_pages.astype(np.float64)
    value_pages = inputs.value_pages.astype(np.float64)
    for sequence, position, row in inputs.rows:
        page = table[sequence, position // size]
        key_pages[page, :, position % size] = inputs.keys[row]
        value_pages[page, :, position % size] = inputs.values[row]
    outputs = np.zeros(inputs.queries.shape)
    group = case.num_heads // case.num_kv_heads
    for sequence, position, row in inputs.rows:
        low = 0 if case.sliding_window is None else max(0, position - case.sliding_window + 1)
        where = [(table[sequence, p // size], p % size) for p in range(low, position + 1)]
        for head in range(case.num_heads):
            keys = np.stack([key_pages[page, head // group, offset] for page, offset in where])
            values = np.stack([value_pages[page, head // group, offset] for page, offset in where])
            scores = keys @ inputs.queries[row, head].astype(np.float64) * case.head_dim**-0.5
            if case.logit_soft_cap is not None:
                scores = case.logit_soft_cap * np.tanh(scores / case.logit_soft_cap)
            weights = np.exp(scores - scores.max())
            outputs[row, head] = weights @ values / weights.sum()
    return outputs, key_pages, value_pages


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("name", thorough_beyond(FEW, BY_NAME, SUBJECT))
def test_case(name: str, backend: str) -> None:
    case = BY_NAME[name]
    inputs = build(case)
    outputs, *pages = run(case, inputs, backend)
    wanted, *wanted_pages = expected(case, inputs)
    rows = [row for _, _, row in inputs.rows]
    np.testing.assert_allclose(outputs[rows], wanted[rows], atol=3e-6, rtol=3e-6)
    for ours, theirs in zip(pages, wanted_pages, strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(np.float32))
    assert np.isfinite(outputs).all(), "padding rows must stay finite"


# Each case in one of the two types, and the definition in both.
QUANTIZED = [(name, "xla", ("int8", "uint8")[i % 2]) for i, name in enumerate(BY_NAME)]
QUANTIZED += [("verify_mixed", "reference", dtype) for dtype in ("int8", "uint8")]


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    thorough_beyond([case for case in QUANTIZED if case[0] in FEW], QUANTIZED, SUBJECT),
)
def test_quantized_pages(name: str, backend: str, dtype: str) -> None:
    """The pages are the truth, new rows included: beyond their rounding no error."""
    case = BY_NAME[name]
    inputs = build(case)
    queries, keys, values, kv_pages = inputs.arrays(backend, dtype=jnp.float32)
    module = IMPLEMENTATIONS[backend]
    logical = (jnp.asarray(pages) for pages in (inputs.key_pages, inputs.value_pages))
    kv_pages = module.from_logical(*logical, dtype)
    assert kv_pages.keys.dtype == kv_pages.values.dtype == jnp.dtype(dtype)
    rounded = [np.asarray(dequantize_rows(*quantize_rows(x, dtype))) for x in (keys, values)]
    truth = dataclasses.replace(
        inputs,
        **dict(zip(("keys", "values"), rounded, strict=True)),
        **dict(
            zip(
                ("key_pages", "value_pages"),
                map(np.asarray, module.to_logical(kv_pages, case.head_dim)),
                strict=True,
            )
        ),
    )
    arrays = queries, keys, values, kv_pages
    outputs, *pages = run(case, inputs, backend, arrays)
    wanted, *wanted_pages = expected(case, truth)
    rows = [row for _, _, row in inputs.rows]
    np.testing.assert_allclose(outputs[rows], wanted[rows], atol=3e-6, rtol=3e-6)
    for ours, theirs in zip(pages, wanted_pages, strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(np.float32))
    assert np.isfinite(outputs).all(), "padding rows must stay finite"


@pytest.mark.parametrize(
    "name",
    thorough_beyond(["mixed"], ["mixed", "verify_mixed", "window_across_blocks"], SUBJECT),
)
def test_bfloat16_stays_near_float32(name: str) -> None:
    case = BY_NAME[name]
    inputs = build(case)
    outputs, kv_pages = ragged_paged_attention(
        *inputs.arrays("xla", jnp.bfloat16),
        inputs.batch,
        scale=case.head_dim**-0.5,
        sliding_window=case.sliding_window,
    )
    assert outputs.dtype == kv_pages.keys.dtype == jnp.bfloat16
    wanted, *_ = expected(case, inputs)
    rows = [row for _, _, row in inputs.rows]
    np.testing.assert_allclose(
        np.asarray(outputs, np.float32)[rows], wanted[rows], atol=0.05, rtol=0.05
    )


def test_pages_are_written_in_place() -> None:
    inputs = build(BY_NAME["mixed"])
    operation = jax.jit(functools.partial(ragged_paged_attention, scale=1.0), donate_argnums=3)
    memory = operation.lower(*inputs.arrays("xla"), inputs.batch).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == inputs.key_pages.nbytes + inputs.value_pages.nbytes


def test_shapes_are_checked() -> None:
    inputs = build(BY_NAME["mixed"])
    arrays = inputs.arrays("xla")
    pages = arrays[3]

    def refused(match: str, *changed: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            functools.partial(ragged_paged_attention, *changed)(inputs.batch, scale=1.0, **options)

    refused("kv_pages", *arrays[:3], pages._replace(keys=pages.keys[:, :, :1]))
    refused("keys", arrays[0], arrays[1][:-1], *arrays[2:])
    refused("no multiple", arrays[0][:, :8], *arrays[1:])
    refused("rows", *(array[:-1] for array in arrays[:3]), pages)
    refused("sliding_window", *arrays, sliding_window=0)


def test_dispatch_takes_the_first_that_does_not_decline() -> None:
    def declines() -> str:
        raise NotImplementedError("only on Tuesdays")

    assert dispatch("op", {"never": declines, "always": lambda: "done"}, None) == "done"
    with pytest.raises(NotImplementedError, match="never: only on Tuesdays"):
        dispatch("op", {"never": declines}, None)
    with pytest.raises(ValueError, match="no backend 'gpu'"):
        dispatch("op", {"never": declines}, "gpu")


def test_tiles_are_pytrees_with_static_rows() -> None:
    tiles = build(BY_NAME["mixed"]).batch.chunks
    leaves, tree = jax.tree.flatten(tiles)
    assert len(leaves) == 3
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, QueryTiles)
    assert again.rows == tiles.rows
    assert isinstance(build(BY_NAME["mixed"]).batch, RaggedBatch)
