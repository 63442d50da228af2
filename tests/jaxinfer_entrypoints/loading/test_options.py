"""Options of a model: values, and the way from flags to a compiled engine."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from jaxinfer_entrypoints import serve
from jaxinfer_entrypoints.command_line.engine import load_options
from jaxinfer_entrypoints.loading.assembly import load_model
from jaxinfer_entrypoints.loading.options import LoadOptions
from jaxinfer_entrypoints.loading.phases import Phases
from tests.jaxinfer_entrypoints.conftest import SIZES


def test_no_flags_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["serve"])
    assert load_options(serve.parse_arguments()) == LoadOptions()


def test_flags_are_values(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--tpu", "v5e-4", "--data-parallel", "2", "--no-prefix-cache", "--draft", "layers:3"]
    monkeypatch.setattr("sys.argv", ["serve", *flags, "--kv-memory", "1GiB"])
    options = load_options(serve.parse_arguments())
    assert options == LoadOptions(
        device="v5e-4", data_parallel=2, prefix_cache=False, draft="layers:3", kv_memory=1 << 30
    )
    assert (options.tpu, options.drafter) == ("v5e-4", ("layers", 3))


def test_a_start_passes_through_few_modules(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the flags of serve.py to a compiled engine: what a reader has to follow."""
    monkeypatch.setattr("sys.argv", ["serve", *SIZES, "--model", str(model_path)])
    passed: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("jaxinfer_entrypoints."):
            passed.add(module)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        load_model(load_options(serve.parse_arguments()), Phases(0.0, quiet=True))
    finally:
        sys.setprofile(before)
    assert {"jaxinfer_entrypoints.serve", "jaxinfer_entrypoints.loading.sizes"} <= passed
    assert len(passed) <= 12, sorted(passed)
