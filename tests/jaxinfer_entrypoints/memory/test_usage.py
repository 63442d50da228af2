"""Memory that is free, and what replicas take."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxinfer.config import DtypePolicy
from jaxinfer_entrypoints.memory import usage as memory
from jaxinfer_entrypoints.memory.cgroup import cgroup_memory


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


def engine_of(kv_mib: int) -> Any:
    sizes = {"parameters": 3 << 20, "kv cache": kv_mib << 20, "slots": 0, "temporaries": 1 << 20}
    return SimpleNamespace(
        spec=SimpleNamespace(
            config=SimpleNamespace(num_pages=8, page_size=16, max_model_len=64, max_num_seqs=2),
            dtypes=DtypePolicy("float32", "float32", "float32"),
        ),
        memory_by_program={1: 0},
        memory_bytes=sizes,
    )


def rows_of(table: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:].strip() for line in table.splitlines()}


def test_the_table_shows_one_replica_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"a": 90 << 20, "b": 70 << 20, "c": None, "d": 80 << 20}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.name])
    devices = [SimpleNamespace(name=name, platform="gpu") for name in free]
    alone = rows_of(memory.memory_table([engine_of(6)], devices[:1]))
    assert (alone["total"], alone["free now"]) == ("10.0", "90.0  of the device")
    assert "all devices" not in alone
    # Two replicas of two devices each; the second has more pages for once.
    both = rows_of(memory.memory_table([engine_of(6), engine_of(8)], devices))
    assert both["kv cache"].startswith("8.0  float32, 8 pages")
    assert both["total"] == "12.0"
    assert both["all devices"] == "44.0  4, 2 replicas"
    assert both["free now"] == "70.0  of the device that has the least"
    # One replica over two devices.
    assert rows_of(memory.memory_table([engine_of(6)], devices[:2]))["all devices"] == "20.0  2"
