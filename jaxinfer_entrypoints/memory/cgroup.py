"""Memory that a container may still take. Linux only; knows no JAX."""

from collections.abc import Iterator
from pathlib import Path


def cgroup_memory(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> tuple[int | None, int | None]:
    """The lowest limit of this process's cgroups and their parents, and what it leaves free."""
    limits: list[tuple[int, int | None]] = []
    for folder, limit_name, usage_name, reclaimable in _memory_cgroups(membership, root):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        # Without a limit version 2 says "max", version 1 nearly 2**63.
        if limit is None or limit >= 1 << 60:
            continue
        for line in lines_of(folder / "memory.stat"):
            name, _, value = line.partition(" ")
            # Cached files count as used, and go when memory is wanted.
            if name == reclaimable and value.isdecimal() and usage is not None:
                usage -= min(usage, int(value))
        limits.append((limit, None if usage is None else max(0, limit - usage)))
    frees = [free for _, free in limits if free is not None]
    return min((limit for limit, _ in limits), default=None), min(frees, default=None)


def _memory_cgroups(membership: Path, root: Path) -> Iterator[tuple[Path, str, str, str]]:
    for line in lines_of(membership):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        inside = Path(path.lstrip("/"))
        if ".." in inside.parts:  # outside of this namespace: not to be seen from here
            inside = Path()
        if not controllers:
            base = root
            limit, usage, reclaimable = "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base = root / "memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        for part in (inside, *inside.parents):
            yield base / part, limit, usage, reclaimable


def lines_of(path: Path) -> list[str]:
    """[] where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = lines_of(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None
