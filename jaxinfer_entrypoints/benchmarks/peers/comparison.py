"""Measures this engine beside others on the same model: ``python scripts/bench_peers.py --help``.

In every round each peer runs once, ours among them, as a process of its own that loads the model
once; each point is timed when the machine is idle, or said to have been disturbed. Figures are
medians over the rounds; a ratio is the median of the ratios within each round.
"""

from jaxinfer_entrypoints.entry import run_main  # before all others: see there

# isort: split

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkpoints.fetch.catalog import CATALOG, resolve
from jaxinfer.config import MAX_CPU_THREADS
from jaxinfer_entrypoints.benchmarks.peers.process import PeerCommand, PeerError, PeerProcess
from jaxinfer_entrypoints.machine.idle import ForeignUse, wait_until_idle

RUNNERS = Path(__file__).resolve().parent
DEFAULT_MODEL = "smollm2-135m-instruct"
OURS = ("jaxinfer", "jaxinfer-fast")
OTHERS = ("transformers", "openvino", "llama.cpp")
SHORT_CONTEXT = 16


@dataclass(frozen=True)
class Point:
    """A point to measure. ``context``: prompt tokens of each sequence; ``steps``: decode steps."""

    kind: str
    batch: int
    context: int
    steps: int
    repetitions: int

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill_{self.context}"
        context = "" if self.context == SHORT_CONTEXT else f"_ctx{self.context}"
        return f"decode_b{self.batch}{context}"


POINTS = (
    Point("prefill", 1, 128, 0, 3),
    Point("prefill", 1, 512, 0, 2),
    Point("prefill", 1, 2048, 0, 1),
    *(Point("decode", batch, SHORT_CONTEXT, 32 if batch < 8 else 16, 2) for batch in (1, 2, 4, 8)),
    *(Point("decode", batch, SHORT_CONTEXT, 16, 2) for batch in (16, 32)),
    Point("decode", 1, 1024, 32, 1),
)


@dataclass(frozen=True)
class Conditions:
    """Conditions under which points are measured, and how often. Seconds, and cores."""

    rounds: int = 3
    idle_cores: float = 0.15
    max_wait_seconds: float = 30.0
    timeout_seconds: float = 600.0


@dataclass
class Sample:
    """One point of one round, in tokens per second; the cores that others used, None if unknown."""

    rate: float
    foreign_cores: float | None


@dataclass
class PeerFigures:
    """One peer's words and figures; samples by point and round. A failure is one line."""

    description: dict[str, Any] = field(default_factory=dict)
    start_seconds: list[float] = field(default_factory=list)
    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """As a program."""
    run_main(bench_peers)


def bench_peers() -> None:
    """Measures what is there, and says what is not; prints and writes the figures."""
    options = parse_arguments()
    if options.output and not options.output.parent.is_dir():
        raise ValueError(f"{options.output}: the folder {options.output.parent} does not exist")
    if options.output and options.output.is_dir():
        raise ValueError(f"{options.output} is a folder, not a file to write")
    model = resolve(options.model).resolve()
    names = dict.fromkeys(options.only or [*OURS, *OTHERS])
    peers = [command_of(name, model, options) for name in names]
    points = [point for point in POINTS if not options.points or point.name in options.points]
    conditions = Conditions(
        options.rounds, options.idle_cores, options.max_wait_seconds, options.timeout_seconds
    )
    measured = measure_all(peers, points, conditions)
    figures = describe(options, conditions) | summarize(measured, points, conditions)
    if not figures["peers"]:
        raise ValueError(f"no peer could be measured: {'; '.join(figures['failures'])}")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures) if options.json else table(figures))


def command_of(name: str, model: Path, options: argparse.Namespace) -> PeerCommand:
    """Returns how a peer of this name is started."""
    threads = str(options.threads)
    flags = ["--model", str(model), "--threads", threads]
    environment = {"NPROC": threads, "OMP_NUM_THREADS": threads}
    if name in OURS:
        runner = [sys.executable, str(RUNNERS / "jaxinfer_runner.py"), *flags]
        return PeerCommand(name, [*runner, *["--fast"] * (name != OURS[0])], environment)
    if name == "llama.cpp":
        folder = (options.llama_cpp or options.peers / "llama.cpp" / "build" / "bin").resolve()
        runner = [sys.executable, str(RUNNERS / "llama_cpp_runner.py"), *flags]
        needs = (str(folder / "llama-bench"), "make peers PEERS_ONLY=llama.cpp, or --llama-cpp DIR")
        return PeerCommand(name, [*runner, "--programs", str(folder)], environment, needs)
    # Not resolved: an environment's interpreter is a link to one outside of it.
    python = Path(os.path.abspath(options.peers)) / name / "bin" / "python"
    runner = [str(python), str(RUNNERS / f"{name}_runner.py"), *flags]
    needs = (str(python), f"make peers PEERS_ONLY={name}")
    return PeerCommand(name, runner, environment, needs)


def measure_all(
    peers: Sequence[PeerCommand], points: Sequence[Point], conditions: Conditions
) -> dict[str, PeerFigures]:
    """All peers in turns, round after round. One that is missing or fails is said to, once."""
    measured = {peer.name: PeerFigures() for peer in peers}
    for number in range(conditions.rounds):
        for peer in peers:
            figures = measured[peer.name]
            if number and not figures.samples:
                continue  # missing, or nothing worked
            try:
                peer.check()
                measure_peer(peer, points, number, conditions, figures)
            except PeerError as error:
                note_failure(figures, f"{peer.name}, round {number + 1}: {error}")
    return measured


def measure_peer(
    peer: PeerCommand,
    points: Sequence[Point],
    number: int,
    conditions: Conditions,
    figures: PeerFigures,
) -> None:
    """One round of one peer: a process, and all its points."""
    begun = time.perf_counter()
    with PeerProcess(peer) as process:
        figures.description = process.ready(conditions.timeout_seconds)
        figures.start_seconds.append(round(time.perf_counter() - begun, 2))
        for point in points:
            wait_until_idle(conditions.idle_cores, conditions.max_wait_seconds)
            foreign = ForeignUse(process.pid)
            fields = {name: getattr(point, name) for name in Point.__dataclass_fields__}
            try:
                rates = process.rates({"name": point.name, **fields}, conditions.timeout_seconds)
            except PeerError as error:
                if process.is_lost:
                    raise
                note_failure(figures, f"{peer.name}, round {number + 1}, {point.name}: {error}")
                continue
            sample = Sample(statistics.median(rates), foreign.cores())
            figures.samples.setdefault(point.name, {})[number] = sample
            told = f"{peer.name:<14} round {number + 1} {point.name:<16} {sample.rate:9.1f} tok/s"
            if is_disturbed(sample, conditions):
                told += f"  disturbed: others used {sample.foreign_cores:.2f} cores"
            print(told, file=sys.stderr, flush=True)


def note_failure(figures: PeerFigures, line: str) -> None:
    """Says it now and in the figures."""
    print(line, file=sys.stderr, flush=True)
    figures.failures.append(line)


def is_disturbed(sample: Sample, conditions: Conditions) -> bool:
    """Tells if others used more of the machine than is allowed for."""
    return sample.foreign_cores is not None and sample.foreign_cores > conditions.idle_cores


def summarize(
    measured: dict[str, PeerFigures], points: Sequence[Point], conditions: Conditions
) -> dict[str, Any]:
    """Medians of every peer, ratios of ours to the others, and what failed."""
    peers = {}
    for name, figures in measured.items():
        if figures.samples:
            peers[name] = figures.description | {
                "start_seconds": figures.start_seconds,
                "tokens_per_second": {
                    point: describe_samples(list(samples.values()), conditions)
                    for point, samples in figures.samples.items()
                },
            }
    ratios = {
        f"{ours} / {other}": {
            point.name: ratio
            for point in points
            if (ratio := ratio_of(measured[ours], measured[other], point.name)) is not None
        }
        for ours in OURS
        for other in measured
        if ours in peers and other in peers and other not in OURS
    }
    failures = [line for figures in measured.values() for line in figures.failures]
    return {"points": [vars(p) | {"name": p.name} for p in points], "peers": peers} | {
        "ratios": ratios,
        "failures": failures,
    }


def describe_samples(samples: Sequence[Sample], conditions: Conditions) -> dict[str, Any]:
    """The median over the rounds, and what it is the median of."""
    return {
        "median": round(statistics.median(sample.rate for sample in samples), 2),
        "rounds": [round(sample.rate, 2) for sample in samples],
        "foreign_cores": [
            sample.foreign_cores if sample.foreign_cores is None else round(sample.foreign_cores, 3)
            for sample in samples
        ],
        "num_disturbed": sum(is_disturbed(sample, conditions) for sample in samples),
    }


def ratio_of(ours: PeerFigures, other: PeerFigures, point: str) -> float | None:
    """The median of the ratios in the rounds that both have, None where there is none."""
    mine, theirs = ours.samples.get(point, {}), other.samples.get(point, {})
    ratios = [mine[number].rate / theirs[number].rate for number in mine if number in theirs]
    return round(statistics.median(ratios), 3) if ratios else None


def describe(options: argparse.Namespace, conditions: Conditions) -> dict[str, Any]:
    """Describes what was measured where, and how."""
    return {
        "model": options.model if options.model in CATALOG else Path(options.model).name,
        "device": "cpu",
        "cpu": cpu_name(),
        "machine": f"{platform.machine()} {platform.system()}",
        "num_cores": os.cpu_count(),
        "threads": options.threads,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "rounds": conditions.rounds,
        "disturbed_above_cores": conditions.idle_cores,
    }


def cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """Returns what the processor calls itself."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or "unknown"


def table(figures: dict[str, Any]) -> str:
    """Peers by points, ratios below; a star marks medians with a disturbed round in them."""
    columns = [point["name"] for point in figures["points"]]
    peers: dict[str, Any] = figures["peers"]
    width = max(map(len, [*figures["ratios"], *peers, "tokens per second"]))
    header = "".join(f"{name:>{len(name) + 2}}" for name in columns)
    lines = [f"{'tokens per second':<{width}}{header}"]
    for name, peer in peers.items():
        cells = {
            point: f"{found['median']:.1f}{'*' if found['num_disturbed'] else ''}"
            for point, found in peer["tokens_per_second"].items()
        }
        lines.append(row(name, width, columns, cells))
    for name, ratios in figures["ratios"].items():
        lines.append(row(name, width, columns, {k: f"{v:.2f}x" for k, v in ratios.items()}))
    for name, peer in peers.items():
        versions = ", ".join(f"{key} {value}" for key, value in peer["versions"].items())
        lines.append(
            f"{name}: weights {peer['weights']}; activations {peer['activations']}; "
            f"timed {peer['timed']}; {versions}"
        )
    if any(s["num_disturbed"] for p in peers.values() for s in p["tokens_per_second"].values()):
        limit = figures["disturbed_above_cores"]
        lines.append(f"*: others used more than {limit:g} cores in at least one round")
    return "\n".join([*lines, *(f"failed: {line}" for line in figures["failures"])])


def row(name: str, width: int, columns: Sequence[str], cells: dict[str, str]) -> str:
    """A line of the table; what was not measured is a dash."""
    return f"{name:<{width}}" + "".join(f"{cells.get(c, '-'):>{len(c) + 2}}" for c in columns)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure this engine beside others, on the CPU.")
    add = parser.add_argument
    names = [*OURS, *OTHERS]
    add("--model", default=DEFAULT_MODEL, help="a GGUF file or a name (default: %(default)s)")
    add("--peers", type=Path, default=Path("build/peers"), help="where make peers put them")
    add("--llama-cpp", type=Path, metavar="DIR", help="a folder with llama-bench in it")
    add("--only", nargs="+", choices=names, help="default: all that are there, and ours")
    points = [point.name for point in POINTS]
    add("--points", nargs="+", choices=points, metavar="POINT", help=f"of {', '.join(points)}")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    threads = min(MAX_CPU_THREADS, os.cpu_count() or 1)  # what our own promise holds for
    add("--threads", type=int, default=threads, help="of every peer (default: %(default)s)")
    add("--idle-cores", type=float, default=0.15, help="what others may use (default: %(default)s)")
    wait_help = "how long a point waits for an idle machine (default: %(default)s)"
    add("--max-wait-seconds", type=float, default=30.0, help=wait_help)
    timeout_help = "of a start and of a point (default: %(default)s)"
    add("--timeout-seconds", type=float, default=600.0, help=timeout_help)
    add("--output", type=Path, metavar="FILE", help="where the figures go as JSON too")
    add("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    limits = {
        "rounds": (1, 100),
        "threads": (1, 1024),
        "idle_cores": (0.001, 1024),
        "max_wait_seconds": (0, 86400),
        "timeout_seconds": (1, 86400),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(options, name) <= high:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} must be between {low} and {high}, got {getattr(options, name)}")
    return options
