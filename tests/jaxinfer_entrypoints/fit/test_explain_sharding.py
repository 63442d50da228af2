"""The output of --explain-sharding, and the flags that ask for devices."""

import argparse
import contextlib
import io
from pathlib import Path

import pytest

from jaxinfer_entrypoints.command_line.engine import add_engine_options, load_options, parse_count
from jaxinfer_entrypoints.fit.explain_sharding import explain_sharding
from jaxinfer_entrypoints.loading import assembly
from jaxinfer_entrypoints.loading.phases import Phases
from tests.conftest import ManyDevices
from tests.jaxinfer_entrypoints.conftest import SIZES, Run


def explain(model: str, *arguments: str) -> str:
    """The table for flags, in a process with eight devices."""
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    parser.add_argument("--data-parallel", type=parse_count, default=1)
    options = load_options(parser.parse_args([*SIZES, "--model", model, *arguments]))
    with contextlib.redirect_stderr(io.StringIO()):
        return explain_sharding(assembly.plan_model(options, Phases(0.0)))


def cells(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(name)]
    return line.removeprefix(name).replace(", ", ",").split()


def test_one_device(run: Run) -> None:
    """As a user asks for it; no weights are read, and no server started."""
    result = run("serve", "--explain-sharding")
    assert result.error == ""
    assert result.stdout.endswith("2 kv heads over 1 devices: 2 each\n")
    assert "total: 1.24 MiB on each of 1 device(s)" in result.stdout


def test_eight_devices(many_devices: ManyDevices, model_path: Path) -> None:
    """2 kv heads of 2 query heads each, a vocabulary of 12: repeated and padded."""
    table = many_devices(explain, str(model_path), "--tensor-parallel", "8")
    assert cells(table, "layers.0-1.attention.qkv x2") == [
        "64x2x4x16",
        "64x8x3x16",
        "(embed,kv_heads,heads_and_kv,head_dim)",
        "(-,tensor,-,-)",
        f"{2 * 64 * 1 * 3 * 16 * 4:,}",
    ]
    assert cells(table, "lm_head")[:2] == ["64x12", "64x16"]
    assert cells(table, "norm")[-3:] == ["(embed)", "(-)", "256"]
    assert cells(table, "kv_pages.0-1.keys x2")[:2] == ["32x2x16x16", "32x8x16x16"]
    assert table.endswith("2 kv heads replicated 4 times, 4 query heads padded to 8")


def test_replicas_need_devices_too(many_devices: ManyDevices, model_path: Path) -> None:
    table = many_devices(explain, str(model_path), "--tensor-parallel", "2", "--data-parallel", "4")
    assert "on each of 2 device(s)" in table
    with pytest.raises(ValueError, match=r"10 devices are needed .* there are 8 x cpu"):
        many_devices(explain, str(model_path), "--tensor-parallel", "2", "--data-parallel", "5")


def test_flags_that_cannot_be_met(run: Run) -> None:
    assert "4 devices are needed" in run("serve", "--tensor-parallel", "4").error
    for flag in ("--tensor-parallel", "--data-parallel"):
        for number in ("0", "-1", "x"):
            assert f"{flag}: must be at least 1" in run("serve", f"{flag}={number}").stderr


def test_heads_that_do_not_divide_are_one_line(many_devices: ManyDevices, model_path: Path) -> None:
    with pytest.raises(ValueError, match="2 kv heads cannot be divided over 3 devices"):
        many_devices(explain, str(model_path), "--tensor-parallel", "3")
