"""Names of TPUs: which there are, and what is said of those that are not."""

import argparse
import re

import pytest

from jaxinfer_entrypoints.command_line.platform import tpu_name
from jaxinfer_entrypoints.machine.tpu_targets import (
    GENERATIONS,
    TpuTarget,
    generation_of_kind,
    parse_target,
)


@pytest.mark.parametrize(
    ("name", "generation", "num_chips", "canonical"),
    [
        ("v5e", "v5e", None, "v5e"),
        ("v5e-1", "v5e", 1, "v5e-1"),
        ("v5litepod-8", "v5e", 8, "v5e-8"),
        ("V5E-4", "v5e", 4, "v5e-4"),
        ("v6e-4", "v6e", 4, "v6e-4"),
        ("v5p", "v5p", None, "v5p"),
        ("v5p-8", "v5p", 4, "v5p-8"),  # 8 cores
        ("v4-8", "v4", 4, "v4-8"),
    ],
)
def test_names(name: str, generation: str, num_chips: int | None, canonical: str) -> None:
    target = parse_target(name)
    assert target == TpuTarget(GENERATIONS[generation], num_chips)
    assert target.name == canonical
    assert tpu_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "v7", "e-8", "v5e8", "v5e-", "v5e-x", "v5e-8-8", "v5e-01", "a" * 99]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no TPU is called {name[:40]!r}")) as error:
        parse_target(name)
    assert "v4, v5e, v5p, v6e" in str(error.value)
    assert "v5e-1, v5e-4, v5e-8" in str(error.value)


@pytest.mark.parametrize("name", ["v5e-3", "v5e-0", "v5e-512", "v6e-2", "v5e-999999"])
def test_sizes_that_do_not_exist(name: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no {name}; .* comes as v\de-1, v\de-4"):
        parse_target(name)


@pytest.mark.parametrize("name", ["v5p-4", "v5p-9", "v5p-1", "v4-4"])
def test_names_that_count_cores(name: str) -> None:
    with pytest.raises(ValueError, match=r"v\dp?-8, v\dp?-16, .*\(names count cores, 2 a chip\)"):
        parse_target(name)


def test_argparse_gets_one_line() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="there is no v5e-3"):
        tpu_name("v5e-3")


def test_every_slice_has_as_many_chips_as_its_shape() -> None:
    for generation in GENERATIONS.values():
        for num_chips, shape in generation.slices.items():
            sides = [int(side) for side in shape.split("x")]
            product = 1
            for side in sides:
                product *= side
            assert product == num_chips, generation.slice_name(num_chips)
            assert parse_target(generation.slice_name(num_chips)).num_chips == num_chips


def test_generations_by_what_devices_call_themselves() -> None:
    assert generation_of_kind("TPU v5 lite").name == "v5e"
    assert generation_of_kind("TPU v5").name == "v5p"
    with pytest.raises(ValueError, match="'cpu'"):
        generation_of_kind("cpu")
