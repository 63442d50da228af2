"""Picks the platform a program runs on; says in one line what is missing."""

import contextlib
import importlib.util
import os

import jax

from jaxinfer.config import MAX_CPU_THREADS
from jaxinfer.sharding import Device
from jaxinfer_entrypoints.loading.options import LoadOptions
from jaxinfer_entrypoints.machine.installing import install_command
from jaxinfer_entrypoints.machine.tpu_targets import parse_target
from jaxinfer_entrypoints.machine.tpu_topology import topology_devices


def pick_devices(options: LoadOptions, count: int | None = 1) -> list[Device]:
    """Returns ``count`` devices of the wanted platform; None for all that a TPU's name says.

    A CPU is as many devices as wanted. With ``options.compile_only`` the TPU's devices are only
    described. Raises ``ValueError`` in one line when there are none or too few.
    """
    if count is not None and count > 1:
        _force_cpu_devices(count)
    if options.compile_only:
        if options.tpu is None:
            raise ValueError("compile_only needs the name of a TPU as device, such as v5e-8")
        devices = topology_devices(parse_target(options.tpu))
    else:
        devices = _devices(options.device)
    if count is not None and len(devices) < count:
        raise ValueError(
            f"{count} devices are needed (--tensor-parallel times --data-parallel), "
            f"there are {len(devices)} x {devices[0].device_kind}"
        )
    return devices[:count]


def _devices(device: str | None) -> list[Device]:
    if device == "cpu" or not _has_accelerator_packages():
        _limit_cpu_threads()
    if device == "cpu":
        # Must come before JAX looks for devices; it then leaves accelerators alone.
        jax.config.update("jax_platforms", "cpu")
        return jax.devices("cpu")
    if device == "gpu":
        return _accelerators("cuda", "--gpu", f"an NVIDIA driver and {install_command('gpu')}")
    if device is not None:
        needed = f"a TPU VM and {install_command('tpu')}"
        devices = _accelerators("tpu", f"--tpu {device}", needed)
        target, kind = parse_target(device), devices[0].device_kind
        wanted = target.num_chips or len(devices)
        if kind not in target.generation.device_kinds or len(devices) < wanted:
            raise ValueError(f"--tpu {device}: this machine has {len(devices)} x {kind}")
        return devices[:wanted]
    return jax.devices()


def _has_accelerator_packages() -> bool:
    names = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    return any(importlib.util.find_spec(name) for name in names)


def _force_cpu_devices(count: int) -> None:
    """Must come before JAX looks for devices; accelerators are what they are. XLA:CPU starts at
    least one thread a device: with more than MAX_CPU_THREADS devices its rows depend on neighbours.
    """
    # When devices are there already, their number is checked like an accelerator's.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def _limit_cpu_threads() -> None:
    """Must come before JAX looks for devices. XLA reads NPROC; a user's own value stands."""
    os.environ.setdefault("NPROC", str(min(MAX_CPU_THREADS, os.cpu_count() or 1)))


def _accelerators(platform: str, flag: str, needed: str) -> list[Device]:
    try:
        return jax.devices(platform)
    except RuntimeError as error:
        found = jax.devices()
        raise ValueError(
            f"{flag}: no {platform} device; found {len(found)} x {found[0].device_kind}. "
            f"It needs {needed}; without one use --cpu"
        ) from error
