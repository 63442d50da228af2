"""The kernels of products with integers through the TPU compiler, which needs no TPU."""

import json
import re

import pytest

from tests.aot.matmul_program import FORMATS, PARTS, compile_feed_forward, compile_product
from tests.aot.matmul_schedule import DATA, TARGETS, schedule
from tests.aot.test_step_programs import collectives

CUSTOM_CALL = 'custom_call_target="tpu_custom_call"'


@pytest.mark.parametrize("target", TARGETS)
def test_bundles_are_those_that_were_kept(target: str) -> None:
    """That they compile says that vector memory suffices.

    A tenth more or less is a change that somebody should know of:
    ``python -m tests.aot.matmul_schedule --write`` keeps new ones.
    """
    kept = json.loads(DATA.read_text())["bundles"][target]
    for name, shapes in schedule(target).items():
        for shape, numbers in shapes.items():
            for what, number in numbers.items():
                assert number == pytest.approx(kept[name][shape][what], rel=0.1), (name, shape)


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_a_chip_of_eight_compile(name: str) -> None:
    for rows in (8, 1100):
        for part, (num_inputs, outputs) in PARTS.items():
            compiled = compile_product("v5e-1", name, rows, num_inputs, outputs)
            text = compiled.as_text()
            assert text.count(CUSTOM_CALL) == 1, part
            assert not re.search(r"= [su]8\[\S+ (copy|fusion|transpose)\(", text), part


@pytest.mark.parametrize("name", FORMATS)
def test_one_sum_and_no_gathered_weights_for_two_products(name: str) -> None:
    rows = 64
    compiled, num_bytes = compile_feed_forward("v5e-8", name, rows)
    text = compiled.as_text()
    assert text.count(CUSTOM_CALL) == 2
    assert collectives(text) == {("all-reduce", rows * 4096): 1}
    assert not re.search(r"= [su]8\[\S+ (copy|fusion|transpose)\(", text)
    assert compiled.memory_analysis().argument_size_in_bytes < num_bytes / 8 * 1.1
