"""The attention kernel through the TPU compiler, which needs no TPU."""

import json
from dataclasses import dataclass, field
from typing import Any

import jax
import pytest

from tests.aot.attention_program import compile_attention
from tests.aot.static_schedule import DATA, SHAPES, TARGETS, schedule

CUSTOM_CALL = 'custom_call_target="tpu_custom_call"'


@dataclass(frozen=True)
class Shape:
    """Heads, head dim and dtype of the pages, and what else is not the default."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: str = "bfloat16"
    options: dict[str, Any] = field(default_factory=dict)


KERNELS = (
    Shape("llama_3_8b", 32, 8, 128),
    Shape("one_chip_of_eight", 4, 1, 128),
    Shape("smollm2", 9, 3, 64),
    Shape("group_of_7_float32", 14, 2, 64, "float32", {"dtype": "float32"}),
    Shape("head_dim_80", 32, 8, 80),
    Shape("head_dim_96_no_groups", 32, 32, 96),
    Shape(
        "head_dim_256_window_cap", 8, 4, 256, options={"sliding_window": 1024, "logit_soft_cap": 50}
    ),
    Shape("verify_rows", 12, 2, 128, options={"decode_rows": 5}),
    Shape("int8_pages", 32, 8, 128, "int8"),
    Shape("int8_side_by_side_verify", 9, 3, 64, "int8", {"decode_rows": 5}),
    Shape("float8_pages_of_256", 32, 8, 128, "uint8", {"page_size": 256}),
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", KERNELS, ids=lambda shape: shape.name)
def test_kernel_compiles_in_place(target: str, shape: Shape) -> None:
    """Memory beyond a core's vector or scalar memory is an error of the compiler."""
    compiled, pages = compile_attention(
        target,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.kv_dtype,
        **shape.options,
    )
    assert compiled.as_text().count(CUSTOM_CALL) == 2  # decodes and chunks
    memory = compiled.memory_analysis()
    page_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages))
    assert memory.alias_size_in_bytes == page_bytes, "pages are copied, or padded by a layout"
    assert memory.temp_size_in_bytes < page_bytes / 4


def test_table_beyond_scalar_memory_is_declined() -> None:
    with pytest.raises(NotImplementedError, match=r"page table of .* in scalar memory"):
        compile_attention("v5e-1", 32, 8, 128, page_size=16, max_model_len=65536)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SHAPES)
def test_bundles_are_those_that_were_kept(target: str, name: str) -> None:
    """A tenth more or less in the busiest loop is a change that somebody should know of.

    ``python -m tests.aot.static_schedule --write`` keeps new ones.
    """
    kept = json.loads(DATA.read_text())["bundles"][target][name]
    counted = schedule(target, *SHAPES[name])
    for kind, numbers in counted.items():
        for what, number in numbers.items():
            assert number == pytest.approx(kept[kind][what], rel=0.1), (kind, what)
