import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from jaxinfer_entrypoints.memory import peak as peak_memory
from jaxinfer_entrypoints.memory.peak import PeakMemory


def hold_and_free() -> None:
    memory = PeakMemory()
    held = np.ones(64 << 20, np.uint8)
    del held
    if peak_memory._CLEAR.exists():
        assert 60 << 20 < memory.added < 200 << 20
        assert memory.describe().endswith(" MiB of host memory at most")
    else:  # not Linux
        assert memory.added == 0
        assert memory.describe() == ""
    assert PeakMemory().added < 20 << 20


def test_what_was_freed_again_is_seen() -> None:
    """In a process of its own: here other tests' engines may be freed meanwhile."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        process.submit(hold_and_free).result()


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_STATUS", peak_memory.Path("/absent"))
    assert PeakMemory().added == 0
    assert PeakMemory().describe() == ""
