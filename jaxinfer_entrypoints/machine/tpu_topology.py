"""Devices of a TPU that is not there, for the TPU compiler, which needs none."""

import importlib.util
import os

import jax

from jaxinfer.sharding import Device
from jaxinfer_entrypoints.machine.installing import AOT_PYTHON, install_command
from jaxinfer_entrypoints.machine.tpu_targets import GENERATIONS, TpuTarget


def topology_devices(target: TpuTarget) -> list[Device]:
    """All devices of ``target``, one chip where it names no size, described and not there.

    Must come before JAX looks for devices. Raises ``ValueError`` in one line without the compiler,
    and for a generation that it cannot be asked about.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(_missing_compiler())
    generation, num_chips = target.generation, target.num_chips or 1
    if not generation.slices:
        known = [other.name for other in GENERATIONS.values() if other.slices]
        raise ValueError(
            f"--compile-only cannot answer for {generation.name}: its compiler takes the two cores "
            f"of a chip, which run as one, for two devices. It can for {', '.join(known)}"
        )
    # What the compiler's library would ask the machine's TPU, and is told instead.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    # A TPU has one owner, whom a lock file tells; nothing here is owned.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # The CUDA plugin of the same extra looks for libraries that compiling does not need.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies  # looks for devices

    shape = generation.slices.get(num_chips)
    bounds = {}
    if shape is None:  # one chip of a generation whose slices are larger
        shape = "1x1x1"
    if num_chips <= generation.chips_per_host:
        sides = [int(side) for side in shape.split("x")]
        bounds["chips_per_host_bounds"] = (*sides, *[1] * (3 - len(sides)))
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{generation.name}:{shape}", **bounds
    )
    return list(described.devices)


def _missing_compiler() -> str:
    command = install_command("aot")
    where = f" in an environment of its own: {AOT_PYTHON}" if command.startswith("make") else ""
    return f"--compile-only needs the TPU compiler, which {command} installs{where}"
