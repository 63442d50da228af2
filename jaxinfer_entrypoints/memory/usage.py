"""Memory that there is, and one table of what goes where."""

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxinfer.engine import Engine
from jaxinfer.sharding import Device
from jaxinfer_entrypoints.machine.tpu_targets import generation_of_kind
from jaxinfer_entrypoints.machine.units import MIB
from jaxinfer_entrypoints.memory.cgroup import cgroup_memory, lines_of


def free_bytes(device: Device) -> int | None:
    """Bytes that are free on a device, of the host for a CPU; None where nobody tells."""
    if device.platform == "cpu":
        return _available_host_bytes()
    try:
        stats = device.memory_stats()
    except jax.errors.JaxRuntimeError:  # a device that is only described
        return generation_of_kind(device.device_kind).hbm_bytes
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def memory_table(engines: Sequence[Engine], devices: Sequence[Device]) -> str:
    """Tabulates what a replica keeps on each device, all on all, in MiB, and what is free now.

    Replicas are alike; where one has more of something, that is shown.
    """
    engine, config = engines[0], engines[0].spec.config
    tokens = config.num_pages * config.page_size
    notes = {
        "parameters": engine.spec.dtypes.matrices,
        "kv cache": f"{engine.spec.dtypes.kv_cache}, {config.num_pages} pages of "
        f"{config.page_size} tokens: {tokens}, {tokens / config.max_model_len:.1f} x the longest "
        "sequence",
        "slots": f"tokens of {config.max_num_seqs} slots, up to {config.max_model_len} each",
        "temporaries": f"of the largest of {len(engine.memory_by_program)} programs",
    }
    each = [engine.memory_bytes for engine in engines]
    sizes = {name: max(kept[name] for kept in each) for name in each[0]}
    lines = ["memory        MiB a device"]
    lines += [f"{name:<12} {size / MIB:>8.1f}  {notes[name]}" for name, size in sizes.items()]
    lines.append(f"{'total':<12} {sum(sizes.values()) / MIB:>8.1f}")
    if len(devices) > 1:
        everything = sum(sum(kept.values()) for kept in each) * len(devices) // len(engines)
        replicas = f", {len(engines)} replicas" if len(engines) > 1 else ""
        lines.append(f"{'all devices':<12} {everything / MIB:>8.1f}  {len(devices)}{replicas}")
    free = [free_bytes(device) for device in devices]
    least = min((size for size in free if size is not None), default=None)
    if least is not None:
        several = "of the device that has the least" if len(devices) > 1 else "of the device"
        where = "of the host" if devices[0].platform == "cpu" else several
        lines.append(f"{'free now':<12} {least / MIB:>8.1f}  {where}")
    return "\n".join(lines)


def _available_host_bytes() -> int | None:
    """Returns what Linux, or a container, would give without swapping; unknown elsewhere."""
    free = [free] if (free := cgroup_memory()[1]) is not None else []
    for line in lines_of(Path("/proc/meminfo")):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            free.append(int(value.split()[0]) * 1024)
    return min(free, default=None)
