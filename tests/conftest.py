"""Settings that every test shares. What is set here must be set before JAX is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA:CPU's threads, the same on every machine: see scripts/platforms.py for what hangs on them.
os.environ.setdefault("NPROC", "2")

import jax
from hypothesis import settings

from checkpoints.catalog import CATALOG, is_cached

jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run, however slow the machine is.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


def pytest_report_header() -> str:
    """Says beforehand when tests will fetch the default model."""
    name = "smollm2-135m-instruct"
    if is_cached(name):
        return f"model: {name} from the cache"
    size = CATALOG[name].num_bytes / 2**20
    return f"model: {name} is not cached; tests marked 'model' fetch it once ({size:.0f} MiB)"
