"""Compiles for TPUs that are not there. Needs the ``aot`` extra; ``make test-aot`` brings it."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# The CUDA plugin of the same extra looks for libraries that nothing here needs.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collected only when asked for by path, since it takes minutes."""
    here = Path(__file__).parent
    asked = [Path(argument.split("::")[0]).resolve() for argument in config.invocation_params.args]
    return None if any(path.is_relative_to(here) for path in asked) else True


@pytest.fixture(autouse=True, scope="session")
def _no_compilation_cache() -> Iterator[None]:
    """The TPU compiler's programs cannot be read back here, which would be a warning each."""
    assert importlib.util.find_spec("libtpu"), "tests/aot needs the TPU compiler: make test-aot"
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
