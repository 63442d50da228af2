"""serve.py --compile-only where there is no TPU compiler: what is refused; tests/aot compiles."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.config import ModelConfig
from jaxinfer_entrypoints.fit import compile_only
from jaxinfer_entrypoints.loading import assembly
from jaxinfer_entrypoints.loading.options import LoadOptions
from jaxinfer_entrypoints.machine import tpu_topology
from jaxinfer_entrypoints.machine.tpu_targets import parse_target
from tests.jaxinfer.tiny import tiny_model
from tests.jaxinfer_entrypoints.conftest import Run
from tests.patience import HANG_SECONDS

ROOT = Path(__file__).parents[3]


def error_of(*flags: str) -> tuple[int, str]:
    """Exit status and the last line of ``serve.py``'s standard error."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "serve.py"), *flags],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()[-1]


def test_it_needs_the_name_of_a_tpu(run: Run) -> None:
    assert "--compile-only needs --tpu NAME" in run("serve", "--compile-only").stderr


def test_names_that_are_no_tpu() -> None:
    status, line = error_of("--tpu", "v5e-3", "--compile-only")
    assert status == 2
    assert "there is no v5e-3; v5e comes as v5e-1, v5e-4, v5e-8" in line


def test_one_thing_at_a_time() -> None:
    status, line = error_of("--tpu", "v5e", "--compile-only", "--explain-sharding")
    assert status == 2
    assert "--explain-sharding: not allowed with argument --compile-only" in line


def test_unknown_models_are_answered_with_every_name_that_would_do(run: Run) -> None:
    error = run("serve", "--explain-sharding", model="llama-3-9b").error
    assert "'llama-3-9b' is neither a file or folder nor a known name; known are" in error
    assert "llama-3-8b" in error
    assert "smollm2-135m-instruct" in error
    error = run("serve", model="llama-3-9b").error
    assert "llama-3-8b" not in error
    assert "smollm2-135m-instruct" in error


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs the TPU compiler, which make aot installs in"):
        tpu_topology.topology_devices(parse_target("v5e-8"))


def test_a_generation_of_which_the_compiler_knows_cores_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"cannot answer for v4.* It can for v5e, v5p, v6e"):
        tpu_topology.topology_devices(parse_target("v4-8"))


def test_a_configuration_is_no_model_to_serve(run: Run) -> None:
    error = run("serve", model="llama-3-8b").error
    assert error.startswith("error: of llama-3-8b only the configuration is here")


def test_a_configuration_is_enough_for_a_table(run: Run) -> None:
    result = run("serve", "--explain-sharding", "--kv-memory", "32MiB", model="llama-3.2-1b")
    assert "too small for one sequence of 8192 tokens" in result.error
    flags = ("--explain-sharding", "--max-model-len", "128", "--kv-memory", "32MiB")
    result = run("serve", *flags, model="llama-3.2-1b")
    assert result.error == ""
    assert "lm_head" in result.stdout


@pytest.mark.parametrize(
    ("kv_heads", "devices", "replicas", "expected"),
    [(8, 8, 1, 8), (8, 8, 2, 4), (3, 8, 1, 1), (3, 4, 1, 1), (2, 8, 1, 8), (3, 6, 1, 6)],
)
def test_as_many_chips_as_the_heads_are_divided_over(
    kv_heads: int,
    devices: int,
    replicas: int,
    expected: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model: ModelConfig = tiny_model(num_key_value_heads=kv_heads, num_attention_heads=2 * kv_heads)
    assert assembly.default_tensor_parallel(model, devices, replicas) == expected
    told = capsys.readouterr().err
    assert (told == "") == (expected * replicas == devices)
    if told:
        assert told.startswith(f"{expected * replicas} of {devices} chips are used: {kv_heads} kv")


@pytest.mark.parametrize(
    ("tensor", "data", "expected"),
    [
        (None, 1, ""),
        (2, 1, "--tensor-parallel 2"),
        (None, 4, "--data-parallel 4"),
        (1, 2, "--tensor-parallel 1 --data-parallel 2"),
    ],
)
def test_flags_that_divide_the_chips(tensor: int | None, data: int, expected: str) -> None:
    options = LoadOptions(tensor_parallel=tensor, data_parallel=data)
    assert compile_only._dividing_flags(options) == expected


def test_fewer_chips_than_replicas() -> None:
    with pytest.raises(ValueError, match="--data-parallel 3 needs as many devices, there"):
        assembly.default_tensor_parallel(tiny_model(), 2, 3)
