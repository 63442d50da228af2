"""How much memory there is, and one table of what goes where."""

from pathlib import Path

from jaxinfer.engine import Engine
from jaxinfer.sharding import Device
from scripts.cgroup_memory import cgroup_memory, lines_of

MIB = 1 << 20


def free_bytes(device: Device) -> int | None:
    """Bytes that are free on a device, of the host for a CPU; None where nobody tells."""
    if device.platform == "cpu":
        return _available_host_bytes()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def memory_table(engine: Engine, devices: list[Device]) -> str:
    """What the engine keeps on each of its devices, in MiB, and what is free now."""
    config = engine.config
    tokens = config.num_pages * config.page_size
    notes = {
        "parameters": engine.dtypes.weights,
        "kv cache": f"{engine.dtypes.kv_cache}, {config.num_pages} pages of {config.page_size} "
        f"tokens: {tokens}, {tokens / config.max_model_len:.1f} x the longest sequence",
        "slots": f"tokens of {config.max_num_seqs} slots, up to {config.max_model_len} each",
        "temporaries": f"of the largest of {len(engine.memory_by_program)} programs",
    }
    sizes = engine.memory_bytes
    lines = ["memory        MiB a device"]
    lines += [f"{name:<12} {size / MIB:>8.1f}  {notes[name]}" for name, size in sizes.items()]
    lines.append(f"{'total':<12} {sum(sizes.values()) / MIB:>8.1f}")
    free = free_bytes(devices[0])
    if free is not None:
        where = "of the host" if devices[0].platform == "cpu" else "of the first device"
        lines.append(f"{'free now':<12} {free / MIB:>8.1f}  {where}")
    return "\n".join(lines)


def _available_host_bytes() -> int | None:
    """What Linux, or a container's limit, would give without swapping; unknown elsewhere."""
    free = [free] if (free := cgroup_memory()[1]) is not None else []
    for line in lines_of(Path("/proc/meminfo")):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            free.append(int(value.split()[0]) * 1024)
    return min(free, default=None)
