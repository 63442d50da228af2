"""scripts/memory.py and scripts/cgroup_memory.py: what is free."""

from pathlib import Path

import jax
import pytest

from scripts import memory
from scripts.cgroup_memory import cgroup_memory


def test_limits_of_cgroups(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    inner = root / "outer" / "inner"
    inner.mkdir(parents=True)

    def found() -> tuple[int | None, int | None]:
        return cgroup_memory(membership, root)

    assert found() == (None, None)
    membership.write_text("0::/outer/inner\n")
    (inner / "memory.max").write_text("max\n")
    (root / "outer" / "memory.max").write_text("1000\n")
    assert found() == (1000, None)
    (root / "outer" / "memory.current").write_text("700\n")
    assert found() == (1000, 300)
    (root / "outer" / "memory.stat").write_text("anon 9\ninactive_file 200\n")
    assert found() == (1000, 500)
    (inner / "memory.max").write_text("800\n")
    (inner / "memory.current").write_text("900\n")
    assert found() == (800, 0)
    membership.write_text("0::/../../elsewhere\n")
    assert found() == (None, None)
    # Version 1, beside an empty version 2.
    membership.write_text("nonsense\n5:cpu,memory:/a\n0::/\n")
    (root / "memory" / "a").mkdir(parents=True)
    (root / "memory" / "a" / "memory.limit_in_bytes").write_text("64\n")
    (root / "memory" / "a" / "memory.usage_in_bytes").write_text("4\n")
    (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert found() == (64, 60)


def test_a_container_leaves_less_than_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices("cpu")[0]
    monkeypatch.setattr(memory, "cgroup_memory", lambda: (1000, 700))
    assert memory.free_bytes(device) == 700
    monkeypatch.setattr(memory, "cgroup_memory", lambda: (None, None))
    free = memory.free_bytes(device)
    assert free is None or free > 1 << 20
    monkeypatch.setattr(memory, "cgroup_memory", lambda: (1 << 60, 1 << 60))
    assert memory.free_bytes(device) is not None
