"""Picks the platform a program runs on; says in one line what is missing."""

import argparse
import contextlib
import importlib.util
import os

import jax

from jaxinfer.engine import MAX_CPU_THREADS
from jaxinfer.sharding import Device

# What the user calls a TPU generation -> how its devices call themselves.
TPU_DEVICE_KINDS = {
    "v4": ("TPU v4",),
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
}


def add_platform_options(parser: argparse.ArgumentParser) -> None:
    """--cpu, --gpu, --tpu GENERATION; without any, the best platform JAX finds."""
    group = parser.add_argument_group("platform").add_mutually_exclusive_group()
    group.add_argument("--cpu", action="store_true", help="run on the CPU")
    group.add_argument("--gpu", action="store_true", help="run on an NVIDIA GPU")
    group.add_argument(
        "--tpu", choices=sorted(TPU_DEVICE_KINDS), help="run on a TPU of this generation"
    )


def pick_devices(options: argparse.Namespace, count: int = 1) -> list[Device]:
    """``count`` devices of the wanted platform.

    A CPU is as many devices as wanted. Raises ``ValueError`` in one line when there are none or
    too few.
    """
    if count > 1:
        _force_cpu_devices(count)
    devices = _devices(options)
    if len(devices) < count:
        raise ValueError(
            f"{count} devices are needed (--tensor-parallel times --data-parallel), "
            f"there are {len(devices)} x {devices[0].device_kind}"
        )
    return devices[:count]


def _devices(options: argparse.Namespace) -> list[Device]:
    if options.cpu or not _has_accelerator_packages():
        _limit_cpu_threads()
    if options.cpu:
        # Must come before JAX looks for devices; it then leaves accelerators alone.
        jax.config.update("jax_platforms", "cpu")
        return jax.devices("cpu")
    if options.gpu:
        return _accelerators("cuda", "--gpu", "an NVIDIA driver and make setup EXTRAS=gpu")
    if options.tpu:
        devices = _accelerators("tpu", f"--tpu {options.tpu}", "a TPU VM and make setup EXTRAS=tpu")
        kind = devices[0].device_kind
        if kind not in TPU_DEVICE_KINDS[options.tpu]:
            raise ValueError(f"--tpu {options.tpu}: this machine has {len(devices)} x {kind}")
        return devices
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
