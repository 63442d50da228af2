"""scripts/doctor.py: its page as a process, what it finds, and what it says about that."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jax
import pytest

from checkpoints.fetch.catalog import resolve
from checkpoints.load import open_checkpoint
from jaxinfer.config import DtypePolicy
from jaxinfer.sharding import make_mesh
from jaxinfer_entrypoints import doctor
from jaxinfer_entrypoints.diagnosis import devices as doctor_devices
from jaxinfer_entrypoints.diagnosis import machine as doctor_machine
from jaxinfer_entrypoints.diagnosis import problems as doctor_problems
from jaxinfer_entrypoints.diagnosis.problems import find_problems
from jaxinfer_entrypoints.loading import sizes as engine_sizes
from jaxinfer_entrypoints.loading.assembly import use_compilation_cache
from jaxinfer_entrypoints.loading.options import DEFAULT_MODEL, LoadOptions
from jaxinfer_entrypoints.memory import plan as memory_plan
from tests.jaxinfer_entrypoints.doctor_report import CPU, FIT, HEALTHY
from tests.patience import HANG_SECONDS
from tests.serving.client.test_client import server_in_thread
from tests.serving.fakes import FakeEngine

ROOT = Path(__file__).parent.parent.parent


def test_as_a_process(tmp_path: Path) -> None:
    """The page can be pasted: the machine's devices, no secrets, no home folder."""
    home = tmp_path / "someone"
    home.mkdir()
    variables = {
        "HOME": str(home),
        "HF_TOKEN": "hf_topsecret",
        "JAX_API_KEY": "topsecret",
        "JAX_REMOTE": "https://me:topsecret@host/x",
        "TPU_DUMP": f"{home}/dump",
        "JAX_PLATFORMS": "cpu",
        "TPU_ODD": "a\nb\x1b[31m",
    }
    environment = {**os.environ, **variables}
    environment.pop("XDG_CACHE_HOME", None)
    command = [sys.executable, str(ROOT / "scripts/doctor.py")]
    results = [
        subprocess.run(
            [*command, *flags],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=HANG_SECONDS,
            check=False,
        )
        for flags in (["--json"], ["--tpu", "v5e"])
    ]
    report = json.loads(results[0].stdout)
    assert [device["platform"] for device in report["devices"]["devices"]] == ["cpu"]
    shown = report["environment"]
    assert shown["JAX_API_KEY"] == "(set, not shown)"
    assert shown["JAX_REMOTE"] == "https://(not shown)@host/x"
    assert shown["TPU_DUMP"] == "~/dump"
    assert report["caches"]["programs"]["path"] == "~/.cache/jaxinfer/xla"
    assert report["models"] == {DEFAULT_MODEL: False}
    assert report["fits"][0]["model"] == DEFAULT_MODEL
    assert {fit["model"] for fit in report["fits"]} == set(doctor_devices.SHAPES)
    what = [problem["what"] for problem in report["problems"]]
    assert f"not in the cache: {DEFAULT_MODEL}" in what
    assert results[0].returncode == (0 if report["can_serve"] else 1), report["problems"]
    # Without the device that was asked for the page is there all the same.
    page = results[1]
    assert page.returncode == 1
    assert "PREVENTS SERVING: no device: --tpu v5e: no tpu device; found 1 x cpu" in page.stdout
    assert "TPU_ODD=a b [31m" in page.stdout
    for result in results:
        assert result.stderr == ""
        assert "topsecret" not in result.stdout
        assert str(home) not in result.stdout


def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[str, str]:
    """Standard output and how it exited, with one device that is made up."""
    found = {"devices": [CPU], "fits": [FIT]}
    monkeypatch.setattr(doctor, "look_for_devices", lambda *_: dict(found))
    monkeypatch.setattr("sys.argv", ["doctor", *flags])
    try:
        doctor.main()
        error = ""
    except SystemExit as exit_:
        error = str(exit_.code)
    out, err = capsys.readouterr()
    return out + err, error


def test_a_broken_package_does_not_break_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> dict[str, Any]:
        raise ImportError("libstdc++ is\ntoo old")

    monkeypatch.setattr(doctor_machine, "port", broken)
    printed, _ = run_main(monkeypatch, capsys)
    assert "port          ImportError: libstdc++ is too old\n" in printed
    assert "note: port cannot be examined (ImportError: libstdc++ is too old)" in printed


def test_wrong_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "nan", "3601"):
        printed, error = run_main(monkeypatch, capsys, "--timeout", value)
        assert "--timeout must be between 1 and 3600, got" in printed
        assert error == "2"


# ------------------------------------------------------------------------- looking for devices


def look_with(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> dict[str, Any]:
    """As if ``program``, a shell script, were Python."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(script))
    monkeypatch.setattr("sys.argv", ["doctor", "--timeout", "1", *flags])
    return doctor.look_for_devices(doctor.parse_arguments())


def test_devices_that_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    found = look_with(f"sleep 50 & echo $! > {tmp_path}/pid; wait", tmp_path, monkeypatch)
    assert found == {"error": "looking for devices took longer than 1 s"}
    assert time.monotonic() - started < HANG_SECONDS
    child = int((tmp_path / "pid").read_text())
    state = re.compile(r"^State:\s+Z", re.MULTILINE)  # ended, and not yet collected
    while True:
        status = Path(f"/proc/{child}/status")
        if not status.exists() or state.search(status.read_text()):
            break
        time.sleep(0.01)
    else:
        pytest.fail("what it started goes on")


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("echo a >&2; echo 'F: no driver' >&2; exit 3", "ended with status 3: F: no driver"),
        ("echo nonsense", "ended with status 0: it printed nothing"),
        ("kill -SEGV $$", "ended with status -11: it printed nothing"),
        ("""echo '{"error": "no cuda device"}'""", "no cuda device"),
    ],
)
def test_devices_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, error: str
) -> None:
    found = look_with(program, tmp_path, monkeypatch)
    assert found["error"].endswith(error)
    report = HEALTHY | {"devices": found, "fits": []}
    (problem,) = find_problems(report)
    assert problem["prevents_serving"]
    assert error in problem["what"]
    assert error in doctor.page(report | {"problems": [problem]})


def test_flags_reach_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"""echo "$@" "$XLA_PYTHON_CLIENT_PREALLOCATE" > {tmp_path}/flags; echo '{{}}'"""
    look_with(program, tmp_path, monkeypatch, "--tpu", "v5e")
    expected = f"{ROOT}/jaxinfer_entrypoints/diagnosis/devices.py --tpu v5e false\n"
    assert (tmp_path / "flags").read_text() == expected


def test_no_such_platform(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["doctor_devices", "--gpu"])
    doctor_devices.main()
    assert json.loads(capsys.readouterr().out)["error"].startswith("--gpu: no cuda device; found")


# ---------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Llama 3.2 1B", 1_235_814_400),
        ("Llama 3.2 3B", 3_212_749_824),
        ("Llama 3.1 8B", 8_030_261_248),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name: str, count: int) -> None:
    mesh = make_mesh(jax.devices()[:1])
    dtypes = DtypePolicy.for_platform("cpu", "float32")
    assert memory_plan.parameter_bytes(doctor_devices.SHAPES[name], dtypes, mesh) == 4 * count


@pytest.mark.model
def test_the_default_model_has_its_shape() -> None:
    checkpoint = open_checkpoint(resolve(DEFAULT_MODEL))
    model, shape = checkpoint.model, doctor_devices.SHAPES[DEFAULT_MODEL]
    assert (model.rope_theta, model.rms_norm_eps) == pytest.approx((shape.rope_theta, 1e-5))
    for name in vars(shape).keys() - {"rope_theta", "rms_norm_eps"}:
        assert getattr(model, name) == getattr(shape, name), name


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 30 layers x 2 x 3 kv heads x 64 x 4 bytes are 46,080 bytes a token."""
    options = LoadOptions()
    model, devices = doctor_devices.SHAPES[DEFAULT_MODEL], jax.devices()[:1]
    parameters = 4 * 134_515_008
    for module in (engine_sizes, doctor_devices):
        monkeypatch.setattr(module, "free_bytes", lambda _: parameters + (3 << 30))
    found = doctor_devices.fit(model, "float32", devices, options)
    assert found == {
        "parameter_bytes": parameters,
        "kv_token_bytes": 46080,
        "kv_tokens": (1 << 30) // (16 * 46080) * 16,
        "most_kv_tokens": (3 << 30) // 46080,
        "refusal": None,
    }
    for module in (engine_sizes, doctor_devices):
        monkeypatch.setattr(module, "free_bytes", lambda _: parameters + 46080 * 5 + 1)
    assert doctor_devices.fit(model, "float32", devices, options)["most_kv_tokens"] == 5
    for module in (engine_sizes, doctor_devices):
        monkeypatch.setattr(module, "free_bytes", lambda _: 1 << 20)
    found = doctor_devices.fit(model, "float32", devices, options)
    assert (found["kv_tokens"], found["most_kv_tokens"]) == (None, 0)
    assert "too small for one sequence of 8192 tokens" in found["refusal"]


# -------------------------------------------------------------------------------- the machine


def test_what_stands_elsewhere_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The doctor runs without the packages, so it repeats a little of what they say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=]", entry)[0] for entry in project["dependencies"]]
    assert sorted(doctor_machine.REQUIRED) == sorted(names)
    wanted = project["requires-python"]
    assert wanted.startswith(">={}.{},".format(*doctor_problems.PYTHON))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    updates: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    use_compilation_cache()
    programs = doctor_machine.caches()["programs"]
    assert programs["path"] == updates["jax_compilation_cache_dir"]


def test_the_doctor_imports_no_package_at_first() -> None:
    code = "import sys, jaxinfer_entrypoints.doctor\n"
    code += "print(sys.modules.keys() & {'jax', 'grpc', 'tqdm'})"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "set()\n"


def test_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    absent = doctor_machine.caches()["programs"]
    assert (absent["exists"], absent["files"], absent["writable"]) == (False, 0, True)
    folder = tmp_path / "jaxinfer" / "xla"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_bytes(b"12345")
    (folder / "deep" / "b").write_bytes(b"678")
    (folder / "link").symlink_to(ROOT)
    found = doctor_machine.caches()["programs"]
    assert (found["exists"], found["files"], found["bytes"]) == (True, 2, 8)
    monkeypatch.setattr(doctor_machine.os, "access", lambda *_: False)  # root may write anywhere
    assert not doctor_machine.caches()["models"]["writable"]


def test_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "PORT_SECONDS", 1.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setattr("serving.client.DEFAULT_TARGET", address)
        assert doctor_machine.port()["state"] == "taken"  # bound, and nobody listens
        other.listen()
        found = doctor_machine.port()
        assert found["state"] == "taken"
        assert found["detail"].startswith("it is no jaxinfer server: ")
    assert doctor_machine.port() == {"address": address, "state": "free", "detail": ""}
    with server_in_thread(FakeEngine()) as address:
        monkeypatch.setattr("serving.client.DEFAULT_TARGET", address)
        found = doctor_machine.port()
        assert found["state"] == "jaxinfer"
        assert re.fullmatch(r"jaxinfer \S+ serves fake", found["detail"])


def test_a_home_folder_in_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    texts = ["/home/ann", "--x=/home/ann/y:/home/ann", "/home/anna/z", "/mnt/home/ann"]
    expected = ["~", "--x=~/y:~", "/home/anna/z", "/mnt/home/ann"]
    assert doctor_machine.without_home({"a": texts, "b": 1}) == {"a": expected, "b": 1}
    monkeypatch.setenv("HOME", "/")
    assert doctor_machine.without_home("/a") == "/a"
