"""Settings that every test shares. What is set here must be set before JAX is imported."""

import functools
import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA:CPU's threads, the same on every machine: see loading/devices.py for what hangs
# on them.
os.environ.setdefault("NPROC", "2")

import jax
import pytest
from hypothesis import settings

from checkpoints.fetch.catalog import CATALOG, is_cached
from tests.not_run import NotRun

jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run, however slow the machine is.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


def pytest_configure(config: pytest.Config) -> None:
    """Programs that several tests want are compiled once, and the next run finds them."""
    # Shells start what runs behind them with Ctrl-C ignored, and that is inherited by programs that
    # tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(NotRun())
    assert config.cache is not None
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_report_header() -> str:
    """Says beforehand when tests will fetch the default model."""
    name = "smollm2-135m-instruct"
    if is_cached(name):
        return f"model: {name} from the cache"
    size = CATALOG[name].num_bytes / 2**20
    return f"model: {name} is not cached; tests marked 'model' fetch it once ({size:.0f} MiB)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of whole programs come first: a file takes minutes, and last it would run alone."""
    programs = (config.rootpath / "tests", config.rootpath / "tests" / "jaxinfer_entrypoints")
    items.sort(key=lambda item: item.path.parent not in programs)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped() -> Iterator[None]:
    """Drops a module's engines and compiled programs behind it.

    A program takes some 30 mappings of memory, of which Linux grants a process 65,530: past that,
    XLA ends in a segmentation fault. All the suite's programs together are more, and kept engines
    are 8 GB. The next module that wants the same program finds it in the cache of compilations.
    """
    yield
    for name, module in list(sys.modules.items()):
        if name.startswith("tests."):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    jax.clear_caches()
    gc.collect()


# ``many_devices(function, *args)``: the function's result, its name importable, all picklable.
ManyDevices = Callable[..., Any]


@pytest.fixture(scope="session")
def many_devices() -> Iterator[ManyDevices]:
    """Runs functions in a process that has eight CPU devices.

    Not in this one: XLA:CPU starts at least as many threads as devices, divides sums between them,
    and a row's bits would then depend on its batch (see jaxinfer_entrypoints/loading/devices.py).
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_take_eight_devices) as process:
        yield lambda function, *args: process.submit(function, *args).result()


def _take_eight_devices() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    warnings.simplefilter("error")
