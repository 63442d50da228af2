"""One page about this machine for a bug report. ``python scripts/doctor.py --help``."""

from jaxinfer_entrypoints.entry import run_main  # before all others: see there

# isort: split

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxinfer_entrypoints.diagnosis import machine as doctor_machine
from jaxinfer_entrypoints.diagnosis.problems import find_problems
from jaxinfer_entrypoints.machine.units import GIB, KIB, MIB

PLATFORM_FLAGS = ("cpu", "gpu", "tpu")
DEFAULT_SECONDS = 120.0


def main() -> None:
    """Entry point ``jaxinfer-doctor``."""
    run_main(doctor)


def doctor() -> None:
    """Prints the page; exits with 1 where something prevents serving."""
    options = parse_arguments()
    if isinstance(sys.stdout, io.TextIOWrapper):  # variables may hold any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    report = doctor_machine.without_home(examine(options))
    print(json.dumps(report, indent=2) if options.json else page(report), flush=True)
    if not report["can_serve"]:
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    """The command line. Platforms are checked where they are looked for."""
    parser = argparse.ArgumentParser(
        description="What this machine has and what would fit; exits with 1 where a problem "
        "prevents serving. Loads no weights and changes nothing."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help="how long looking for devices may take (default: %(default)s)",
    )
    group = parser.add_argument_group("platform, as for serving").add_mutually_exclusive_group()
    group.add_argument("--cpu", action="store_true", help="look at the CPU only")
    group.add_argument("--gpu", action="store_true", help="look for an NVIDIA GPU")
    group.add_argument("--tpu", metavar="GENERATION", help="look for a TPU, such as v5e")
    options = parser.parse_args()
    if not 1 <= options.timeout <= 3600:
        parser.error(f"--timeout must be between 1 and 3600, got {options.timeout}")
    return options


def examine(options: argparse.Namespace) -> dict[str, Any]:
    """All that the page says. What cannot be found out says why, as ``error``."""
    report: dict[str, Any] = {
        "versions": doctor_machine.versions(),
        "packages": doctor_machine.packages(),
        "environment": doctor_machine.environment(),
        "cores": doctor_machine.cores(),
        "memory": doctor_machine.host_memory(),
        "nvidia_smi": doctor_machine.nvidia_gpus(),
        "caches": attempt(doctor_machine.caches),
        "models": attempt(doctor_machine.cached_models),
        "port": attempt(doctor_machine.port),
    }
    found = look_for_devices(options)
    report |= {"devices": found, "fits": found.pop("fits", [])}
    problems = list(find_problems(report))
    can_serve = not any(problem["prevents_serving"] for problem in problems)
    return report | {"problems": problems, "can_serve": can_serve}


def attempt(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A broken package must not keep the rest of the page from being printed."""
    try:
        return find()
    except Exception as error:  # whatever a broken package raises
        return {"error": one_line(f"{type(error).__name__}: {error}")}


def look_for_devices(options: argparse.Namespace) -> dict[str, Any]:
    """``devices`` and ``fits``, or ``error``, from a process that may hang or end as it likes."""
    script = Path(__file__).parent / "diagnosis" / "devices.py"
    command = [sys.executable, str(script)]
    command += [f"--{name}" for name in PLATFORM_FLAGS[:2] if getattr(options, name)]
    command += ["--tpu", options.tpu] if options.tpu is not None else []
    # JAX would take three quarters of a GPU at once, from whoever is using it.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return {"error": one_line(str(error))}
    try:
        output, errors = process.communicate(timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"looking for devices took longer than {options.timeout:g} s"}
    finally:
        # What it started may hold its pipes open.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    try:
        found = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        last = one_line(errors.strip().rpartition("\n")[2]) or "it printed nothing"
        return {"error": f"looking for devices ended with status {process.returncode}: {last}"}
    return found


def page(report: dict[str, Any]) -> str:
    """The report as text of few columns."""
    lines = []
    for title, rows in sections(report):
        for row in rows or ["none"]:
            lines.append(f"{title:<12}  {one_line(row)}".rstrip())
            title = ""
    lines += ["", *fit_table(report["fits"]), ""]
    if not report["problems"]:
        lines.append("no problems found")
    for problem in report["problems"]:
        kind = "PREVENTS SERVING" if problem["prevents_serving"] else "note"
        lines.append(one_line(f"{kind}: {problem['what']}. {problem['remedy']}"))
    return "\n".join(lines)


def sections(report: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Titles and lines, in the order of the page."""
    versions, memory, devices = report["versions"], report["memory"], report["devices"]
    commit = f", commit {versions['commit']}" if versions["commit"] else ""
    yield "jaxinfer", [f"{versions['jaxinfer'] or 'not installed'}{commit}"]
    yield "system", [versions["system"]]
    yield "python", [f"{versions['python']} at {versions['executable']}"]
    shown = [f"{name} {version or 'MISSING'}" for name, version in report["packages"].items()]
    yield "packages", [", ".join(shown[i : i + 5]) for i in range(0, len(shown), 5)]
    yield "environment", [f"{name}={value}" for name, value in report["environment"].items()]
    cores = report["cores"]
    yield "cores", [f"{number(cores['total'])}, usable {number(cores['usable'])}"]
    limit = memory["cgroup_limit_bytes"]
    bound = "no cgroup limit" if limit is None else f"cgroup limit {size(limit)}"
    if limit is not None:
        bound += f", of which free {size(memory['cgroup_free_bytes'])}"
    free = size(memory["free_bytes"])
    yield "memory", [f"{size(memory['total_bytes'])}, free {free}, {bound}"]
    yield "devices", [devices["error"]] if "error" in devices else device_lines(devices["devices"])
    if report["nvidia_smi"]:
        yield "nvidia-smi", report["nvidia_smi"]
    yield "caches", cache_lines(report["caches"])
    yield (
        "models",
        named(report["models"], lambda is_cached: "cached" if is_cached else "not cached"),
    )
    port = report["port"]
    described = port.get("error") or f"{port['address']}: {port['state']}  {port['detail']}"
    yield "port", [described]


def device_lines(devices: list[dict[str, Any]]) -> list[str]:
    """Equal devices are one line."""
    lines = [
        f"{device['kind']} ({device['platform']}), memory "
        + ("of the host" if device["platform"] == "cpu" else size(device["memory_bytes"]))
        + f", free {size(device['free_bytes'])}"
        for device in devices
    ]
    return [f"{lines.count(line)} x {line}" for line in dict.fromkeys(lines)]


def cache_lines(caches: dict[str, Any]) -> list[str]:
    """Describes caches: where, how many files, how large, writable or not."""
    return named(
        caches,
        lambda cache: (
            f"{cache['path']}, {cache['files']} files, {cache['bytes'] / 2**20:.1f} MiB, "
            + ("writable" if cache["writable"] else "NOT WRITABLE")
            + f", disk free {size(cache['disk_free_bytes'])}"
            + (f", {cache['unreadable']} unreadable" if cache["unreadable"] else "")
        ),
    )


def named(found: dict[str, Any], describe: Callable[[Any], str]) -> list[str]:
    """A line for each entry, or what went wrong."""
    if "error" in found:
        return [found["error"]]
    return [f"{name}: {describe(value)}" for name, value in found.items()]


def fit_table(fits: list[dict[str, Any]]) -> list[str]:
    """Aligns the table of what would fit."""
    if not fits:
        return ["what would fit is not known without devices"]
    rows = [("model", "dtype", "devices", "parameters", "KV a token", "tokens", "at most")]
    rows += [
        (
            fit["model"],
            fit["dtype"],
            str(fit["num_devices"]),
            size(fit["parameter_bytes"]),
            size(fit["kv_token_bytes"]),
            "refused" if fit["kv_tokens"] is None else str(fit["kv_tokens"]),
            number(fit["most_kv_tokens"]),
        )
        for fit in fits
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "what would fit: arithmetic, not a measurement. Parameters on each device; tokens of KV",
        "cache that a start without flags takes, and at most, if nothing else needed memory.",
        "Refused: not one longest sequence fits; --kv-memory and --max-model-len may change that.",
    ]
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells))
    return lines


def size(num_bytes: int | None) -> str:
    """Bytes in the unit that reads best."""
    if num_bytes is None:
        return "unknown"
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def number(count: int | None) -> str:
    """A number, or that nobody tells it."""
    return "unknown" if count is None else str(count)


def one_line(text: str) -> str:
    """Without what would break the page or steer a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).strip()
