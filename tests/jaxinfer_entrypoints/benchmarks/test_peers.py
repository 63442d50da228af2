"""scripts/bench_peers.py with runners that measure nothing but talk as the real ones do."""

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from jaxinfer_entrypoints.benchmarks.peers import comparison as bench_peers
from jaxinfer_entrypoints.benchmarks.peers.comparison import Conditions, PeerFigures, Point, Sample
from jaxinfer_entrypoints.benchmarks.peers.process import PeerCommand, PeerError, PeerProcess
from jaxinfer_entrypoints.machine.idle import (
    ForeignUse,
    busy_seconds,
    process_seconds,
    wait_until_idle,
)
from tests.patience import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
READY = {"weights": "", "activations": "", "timed": "", "versions": {}}
QUICK = Conditions(rounds=3, idle_cores=64.0, max_wait_seconds=0.0, timeout_seconds=HANG_SECONDS)
PREFILL, DECODE = Point("prefill", 1, 128, 0, 2), Point("decode", 4, 16, 8, 3)

# Its decode rates are 1, 2, 3, ... for the first batch; it counts its measurements.
RUNNER = """
import sys
sys.path.insert(0, {folder!r})
from runner_protocol import random_ids, run_peer
number = 0
def start(options):
    print("noise on stdout")
    def measure(point):
        global number
        number += 1
        if point["kind"] == "prefill" and {fails}:
            raise RuntimeError("no room\\nfor it")
        assert len(random_ids(point["batch"], point["context"])[-1]) == point["context"]
        return {scale} * float(number)
    said = dict(weights="none", activations="none", timed="nothing", versions=dict(fake="1"))
    return said, measure
run_peer(start)
"""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfer_entrypoints.machine.idle.SAMPLE_SECONDS", 0.0)


def runner(
    tmp_path: Path, name: str, *, scale: float = 1.0, fails: bool = False, text: str = RUNNER
) -> PeerCommand:
    path = tmp_path / f"{name}.py"
    path.write_text(text.format(folder=str(bench_peers.RUNNERS), scale=scale, fails=fails))
    return PeerCommand(name, [sys.executable, str(path), "--model", "m", "--threads", "1"])


def test_medians_ratios_and_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = [
        runner(tmp_path, "jaxinfer", scale=3.0),
        runner(tmp_path, "openvino", fails=True),
        PeerCommand("llama.cpp", ["true"], needs=(str(tmp_path / "no"), "make peers")),
    ]
    measured = bench_peers.measure_all(peers, [PREFILL, DECODE], QUICK)
    figures = bench_peers.summarize(measured, [PREFILL, DECODE], QUICK)
    assert json.loads(json.dumps(figures)) == figures
    ours, theirs = figures["peers"]["jaxinfer"], figures["peers"]["openvino"]
    # After one measurement to warm up come 2 and 3, then 4 to warm up and 5, 6 and 7.
    assert ours["tokens_per_second"]["prefill_128"]["rounds"] == [7.5] * 3
    assert ours["tokens_per_second"]["decode_b4"]["median"] == 18.0
    assert len(ours["start_seconds"]) == 3
    # Its prefill failed in the warm-up, so that its decode begins with number 2.
    assert theirs["tokens_per_second"]["decode_b4"]["rounds"] == [4.0] * 3
    assert "prefill_128" not in theirs["tokens_per_second"]
    assert figures["ratios"] == {"jaxinfer / openvino": {"decode_b4": 4.5}}
    missing, *failed = sorted(figures["failures"])
    assert missing == f"llama.cpp, round 1: there is no {tmp_path / 'no'}: make peers"
    assert failed == [
        f"openvino, round {number}, prefill_128: RuntimeError: no room for it"
        for number in (1, 2, 3)
    ]
    assert missing in capsys.readouterr().err
    text = bench_peers.table(figures | {"disturbed_above_cores": 64.0})
    assert "jaxinfer / openvino" in text
    assert "4.50x" in text
    assert "openvino: weights none; activations none; timed nothing; fake 1" in text
    assert f"failed: {missing}" in text


@pytest.mark.thorough("benchmarks")
@pytest.mark.usefixtures("frees_memory", "user_cache")
def test_our_own_runner(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures in earnest, but for the token ids, which a tiny vocabulary lacks."""
    monkeypatch.setattr(sys, "path", [str(bench_peers.RUNNERS), *sys.path])
    ours = importlib.import_module("jaxinfer_runner")
    monkeypatch.setattr(ours, "random_ids", lambda batch, length: [[3] * length] * batch)
    options = argparse.Namespace(model=str(model_path), threads=1, fast=False)
    with ExitStack() as opened:
        said, measure = ours.start(opened, options)
        assert said["weights"] == "float32, expanded from the GGUF"
        assert measure(vars(Point("prefill", 1, 70, 0, 1))) > 0
        assert measure(vars(Point("decode", 9, 16, 3, 1))) > 0
        del measure


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    ours = PeerFigures(samples={"p": {0: Sample(10, 0), 1: Sample(5, 0), 2: Sample(12, 0)}})
    other = PeerFigures(samples={"p": {0: Sample(5, 0), 1: Sample(2.5, 0)}})
    assert bench_peers.ratio_of(ours, other, "p") == 2
    assert bench_peers.ratio_of(ours, PeerFigures(), "p") is None


def test_disturbed_rounds_are_marked() -> None:
    conditions = Conditions(idle_cores=0.15)
    samples = [Sample(10.0, 0.1), Sample(7.0, 0.9), Sample(9.0, None)]
    found = bench_peers.describe_samples(samples, conditions)
    assert found["median"] == 9
    assert found["num_disturbed"] == 1
    assert found["foreign_cores"] == [0.1, 0.9, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit('no torch here')", "it ended with status 1: no torch here"),
        ("print('hello')", "what it says is not JSON: 'hello'"),
        ("print(7)", "what it says is no object: '7'"),
        (
            "print('{{\"ready\": {{}}}}')",
            "it does not say its activations, timed, versions, weights",
        ),
        ("print('{{}}')", "it does not say ready: '{}'"),
        ("print('x' * 10_000_000)", "what it says is not JSON: 'xxx"),
    ],
)
def test_a_peer_that_cannot_start_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    measured = bench_peers.measure_all([runner(tmp_path, "peer", text=text)], [DECODE], QUICK)
    (line,) = measured["peer"].failures  # the other rounds are not tried
    assert line.startswith(f"peer, round 1: {message}")
    assert len(line) < 500


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('{"rates": []}', "it answered no tokens per second: []"),
        ('{"rates": [NaN]}', "it answered no tokens per second: [nan]"),
        ('{"rates": [-1]}', "it answered no tokens per second: [-1]"),
        ('{"rates": ["1"]}', "it answered no tokens per second: ['1']"),
    ],
)
def test_figures_that_are_none_are_refused(tmp_path: Path, answer: str, message: str) -> None:
    ready = json.dumps({"ready": READY})
    text = f"print({ready!r}, flush=True)\ninput()\nprint({answer!r}, flush=True)\n"
    path = tmp_path / "peer.py"
    path.write_text(text + "input()")
    with PeerProcess(PeerCommand("peer", [sys.executable, str(path)])) as process:
        assert process.ready(HANG_SECONDS) == READY
        with pytest.raises(PeerError) as error:
            process.rates({}, HANG_SECONDS)
        assert str(error.value) == message


def test_a_peer_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    path = tmp_path / "peer.py"
    path.write_text(
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"print({json.dumps({'ready': READY})!r}, flush=True)\n"
        "time.sleep(600)\n"
    )
    with PeerProcess(PeerCommand("peer", [sys.executable, str(path)])) as process:
        process.ready(HANG_SECONDS)
        with pytest.raises(PeerError, match=r"^no answer within 0\.2 s$"):
            process.rates({}, 0.2)
        assert process.is_lost
    for pid in map(int, pids.read_text().split()):
        deadline = time.monotonic() + HANG_SECONDS
        while is_running(pid):
            assert time.monotonic() < deadline, f"process {pid} still runs"
            time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_a_missing_interpreter_is_one_line() -> None:
    with pytest.raises(PeerError, match=r"^cannot start /nowhere/python: No such file"):
        PeerProcess(PeerCommand("peer", ["/nowhere/python"]))


def test_fields_of_proc(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    path = tmp_path / "stat"
    path.write_text(f"cpu {ticks} {2 * ticks} {4 * ticks} 999 999 {8 * ticks} 0 {16 * ticks} 5 5\n")
    assert busy_seconds(path) == 31  # neither idle nor waiting for disks; stolen time counts
    assert busy_seconds(tmp_path / "no") is None
    (tmp_path / "7").mkdir()
    fields = ["0"] * 10 + [str(ticks), str(2 * ticks), str(4 * ticks), str(8 * ticks)] + ["9"] * 9
    (tmp_path / "7" / "stat").write_text(f"7 (a ) name) S {' '.join(fields)}\n")
    assert process_seconds(7, tmp_path) == 15
    assert process_seconds(8, tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_foreign_use_leaves_out_what_is_measured() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            own, others = ForeignUse(process.pid), ForeignUse(os.getpid())
            while (process_seconds(process.pid) or 0.0) < 0.3:
                time.sleep(0.02)
            own_cores, other_cores = own.cores(), others.cores()
        finally:
            process.kill()
    assert own_cores is not None
    assert other_cores is not None
    assert other_cores > own_cores
    assert wait_until_idle(1e9, 0.0) is not None


def test_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def error_of(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["bench_peers.py", *flags])
        with pytest.raises(SystemExit) as error:
            bench_peers.main()
        return str(error.value.code)

    assert error_of("--rounds", "0") == "2"
    assert error_of("--points", "decode_b3") == "2"
    assert error_of("--idle-cores", "nan") == "2"
    assert "is neither a file or folder nor a known name" in error_of("--model", "nope")
    model = tmp_path / "model.gguf"
    model.write_bytes(b"")
    flags = ["--model", str(model), "--peers", str(tmp_path), "--only", "openvino"]
    error = error_of(*flags)
    python = tmp_path / "openvino" / "bin" / "python"
    assert error.startswith("error: no peer could be measured: openvino, round 1: ")
    assert error.endswith(f"there is no {python}: make peers PEERS_ONLY=openvino")


def test_points_have_names_of_their_own() -> None:
    names = [point.name for point in bench_peers.POINTS]
    assert len(set(names)) == len(names)
    assert {"prefill_2048", "decode_b1", "decode_b32", "decode_b1_ctx1024"} <= set(names)


def test_make_builds_peers_and_measures_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets' commands are looked at; the peers themselves are gigabytes."""
    made = [".venv/.runtime", ".venv/bin/python"]
    flags = ["PEERS=p", "PEERS_ONLY=transformers", "ARGS=--rounds 1"]
    monkeypatch.delenv("MAKEFLAGS", raising=False)  # of the tests' own make
    monkeypatch.delenv("MAKELEVEL", raising=False)
    dry_run = ["make", "-n", *(f"-o{name}" for name in made), *flags]
    shown = subprocess.run(
        [*dry_run, "peers", "bench-peers"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert "torch" in shown
    assert "transformers" in shown
    command = shown.replace("\\\n", " ").rpartition("scripts/")[2]
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    options = bench_peers.parse_arguments()
    assert options.only == ["jaxinfer", "jaxinfer-fast", "transformers"]
    assert options.rounds == 1
