"""A tiny model file and a way to run a script in this process."""

import gc
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxinfer_entrypoints.loading.assembly import LoadedModel, load_model
from tests.checkpoints.gguf.tiny_gguf import llama_bytes

# One program shape less to compile than with the defaults, and a context of 128 tokens.
SIZES = ["--cpu", "--max-num-seqs", "2", "--max-num-batched-tokens", "64", "--kv-memory", "1MiB"]


@dataclass(frozen=True)
class Result:
    """A script's output, and how it ended."""

    stdout: str
    stderr: str
    error: str

    @property
    def lines(self) -> list[Any]:
        """Standard output as lines of JSON."""
        return [json.loads(line) for line in self.stdout.splitlines()]


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(llama_bytes())
    return path


def live_arrays() -> set[int]:
    """Identities of the arrays that take memory of a device."""
    return {id(array) for array in jax.live_arrays() if not array.is_deleted()}


@pytest.fixture
def frees_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a model that ``LLM`` loads leaves memory taken.

    The models are held until then: what is freed only because nobody holds it does not count.
    """
    held: list[LoadedModel] = []

    def load(*arguments: Any) -> LoadedModel:
        held.append(load_model(*arguments))
        return held[-1]

    monkeypatch.setattr("jaxinfer_entrypoints.llm.load_model", load)
    before = live_arrays()
    yield
    gc.collect()  # further engines
    assert held
    assert live_arrays() <= before


@pytest.fixture
def user_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A cache folder of the tests' own, and JAX's settings for it as they were afterwards."""
    cache = tmp_path_factory.getbasetemp() / "cache"  # shared: programs are compiled once
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def run(
    model_path: Path,
    user_cache: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """``run("generate", "--json", "abc")`` with the tiny model and sizes."""

    def run_script(script: str, *arguments: str, model: str | None = None) -> Result:
        module = importlib.import_module(f"jaxinfer_entrypoints.{script}")
        # argparse takes the last of equal flags: a test's own win.
        first = list(arguments[: script == "bench" and len(arguments) > 0])
        command = [*first, *SIZES, "--model", model or str(model_path)]
        monkeypatch.setattr("sys.argv", [script, *command, *arguments[len(first) :]])
        error = ""
        try:
            module.main()
        except SystemExit as exit_:
            error = str(exit_.code)
            assert error != "0"
        out, err = capsys.readouterr()
        return Result(out, err, error)

    return run_script
