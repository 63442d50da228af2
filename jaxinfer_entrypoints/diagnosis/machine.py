"""Facts of a machine for a bug report.

Imports only the standard library at first: the doctor must run where the packages do not.
"""

import errno
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxinfer_entrypoints.machine.installing import ROOT
from jaxinfer_entrypoints.memory.cgroup import cgroup_memory, lines_of

# The dependencies of pyproject.toml, and what accelerators need.
REQUIRED = (
    *("jax", "jaxlib", "flax", "orbax-checkpoint", "optax", "numpy", "grpcio"),
    *("grpcio-health-checking", "grpcio-reflection", "protobuf", "tokenizers", "jinja2"),
    *("safetensors", "huggingface-hub", "tqdm"),
)
OPTIONAL = (
    *("libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
VARIABLES = re.compile(
    r"(JAX|TPU|XLA|LIBTPU|NCCL)_\w+|NPROC|CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES|XDG_CACHE_HOME"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY|AUTH", re.IGNORECASE)
MAX_VALUE_CHARACTERS = 300
TOOL_SECONDS = 10.0
PORT_SECONDS = 3.0


def versions() -> dict[str, Any]:
    """Returns the versions of jaxinfer, its commit in a checkout, the system and Python."""
    return {
        "jaxinfer": _version("jaxinfer"),
        "commit": _commit(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "executable": sys.executable,
    }


def packages() -> dict[str, str | None]:
    """Versions; None for what is needed and not installed."""
    found = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    return {name: version for name, version in found.items() if version or name in REQUIRED}


def environment() -> dict[str, str]:
    """The variables that change what runs, without what may be secret."""
    return {
        name: _shown(name, value)
        for name, value in sorted(os.environ.items())
        if VARIABLES.fullmatch(name)
    }


def _shown(name: str, value: str) -> str:
    if SECRET.search(name):
        return "(set, not shown)"
    # A password in an address, as in a proxy's or a cache's.
    value = re.sub(r"//[^/@\s]*@", "//(not shown)@", value)
    left = len(value) - MAX_VALUE_CHARACTERS
    return value[:MAX_VALUE_CHARACTERS] + (f"... and {left} characters" if left > 0 else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns this checkout's commit, "changed" where files differ; None in an installation."""
    if not (ROOT / ".git").exists():  # or the commit would be that of a folder around it
        return None
    git = ["git", "-C", str(ROOT)]
    commit = run_tool([*git, "rev-parse", "--short=12", "HEAD"])
    changes = run_tool([*git, "status", "--porcelain"])
    return commit and commit + (", changed" if changes else "")


def run_tool(command: list[str]) -> str | None:
    """Returns what a program printed; None where it is not there, fails or takes too long."""
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def nvidia_gpus() -> list[str]:
    """Name, driver and memory of each GPU by nvidia-smi; empty without it."""
    query = "--query-gpu=name,driver_version,memory.total,memory.used"
    printed = run_tool(["nvidia-smi", query, "--format=csv,noheader"])
    return printed.splitlines() if printed else []


def cores() -> dict[str, int | None]:
    """Counts the machine's cores, and those that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {"total": os.cpu_count(), "usable": usable}


def host_memory() -> dict[str, int | None]:
    """Bytes; None where the system does not tell."""
    found: dict[str, int] = {}
    for line in lines_of(Path("/proc/meminfo")):
        name, _, value = line.partition(":")
        if value.split()[:1] and value.split()[0].isdecimal():
            found[name] = int(value.split()[0]) * 1024
    total = found.get("MemTotal")
    if total is None and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, free = cgroup_memory()
    return {
        "total_bytes": total,
        "free_bytes": found.get("MemAvailable"),
        "cgroup_limit_bytes": limit,
        "cgroup_free_bytes": free,
    }


def caches() -> dict[str, dict[str, Any]]:
    """Finds where compiled programs and models are kept, and how much that is."""
    from checkpoints.fetch.catalog import cache_folder, user_cache_folder

    models, programs = cache_folder(), user_cache_folder() / "xla"
    return {"programs": _folder(programs), "models": _folder(models)}


def cached_models() -> dict[str, bool]:
    """The catalog's names, and whether they are in the cache."""
    from checkpoints.fetch.catalog import CATALOG, is_cached

    return {name: is_cached(name) for name in CATALOG}


def _folder(path: Path) -> dict[str, Any]:
    """Files below ``path``, and whether more could be written, into it or where it would be."""
    sizes, unreadable = [], 0
    # The cache's own folder only: a link elsewhere is not followed.
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                sizes.append(os.lstat(os.path.join(folder, name)).st_size)
            except OSError:
                unreadable += 1
    there = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        free = None
    return {
        "path": str(path),
        "exists": path.is_dir(),
        "files": len(sizes),
        "bytes": sum(sizes),
        "unreadable": unreadable,
        "writable": there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        "disk_free_bytes": free,
    }


def port() -> dict[str, Any]:
    """Asks what listens where a server would: free, jaxinfer, loading, taken or unknown."""
    from serving.client import DEFAULT_TARGET, Client, ServerError

    host, _, number = DEFAULT_TARGET.rpartition(":")
    result: dict[str, Any] = {"address": DEFAULT_TARGET}
    try:
        socket.create_connection((host, int(number)), timeout=PORT_SECONDS).close()
    except OSError:
        # Nobody listens; it may still be bound, or not allowed.
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(number)))
            except OSError as error:
                is_taken = error.errno == errno.EADDRINUSE
                state = "taken" if is_taken else "unknown"
                return result | {"state": state, "detail": error.strerror or str(error)}
        return result | {"state": "free", "detail": ""}
    try:
        with Client(DEFAULT_TARGET) as client:
            if not client.is_serving(timeout=PORT_SECONDS):
                return result | {"state": "loading", "detail": "jaxinfer, which is not ready"}
            info = client.model_info(timeout=PORT_SECONDS)
    except ServerError as error:
        return result | {"state": "taken", "detail": f"it is no jaxinfer server: {error}"}
    detail = f"jaxinfer {info.version} serves {info.model_name}"
    return result | {"state": "jaxinfer", "detail": detail}


def without_home(value: Any) -> Any:
    """``value`` with the user's home folder as ~ in all its texts."""
    if isinstance(value, dict):
        return {key: without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_home(item) for item in value]
    if not isinstance(value, str):
        return value
    homes = {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))}
    for home in sorted(homes - {"/", "~", ""}, key=len, reverse=True):
        value = re.sub(rf"(?<![\w.~-]){re.escape(home.rstrip('/'))}(?![\w.-])", "~", value)
    return value
