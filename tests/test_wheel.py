"""The wheel in an empty environment: what is in it, and that its programs run away from here.

Needs the package index, as ``make setup`` does; what that has fetched is found in uv's cache.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.checkpoints.gguf.tiny_gguf import llama_bytes
from tests.jaxinfer_entrypoints.conftest import SIZES
from tests.patience import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"checkpoints", "jaxinfer", "jaxinfer_entrypoints", "pallas_kernels", "serving"}
PROGRAMS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "scripts"
]
# What a fresh clone does not have.
UNTRACKED = (".*", "__pycache__", "build", "dist", "*.egg-info")

pytestmark = pytest.mark.thorough("the wheel")


def find_uv() -> str | None:
    """As the Makefile does: uv from the PATH if it runs, else our own; None is neither."""
    for uv in (shutil.which("uv"), str(ROOT / ".venv-uv/bin/uv")):
        if uv and Path(uv).exists():
            done = subprocess.run([uv, "--version"], check=False, capture_output=True)
            if done.returncode == 0:
                return uv
    return None


def run_tool(*command: object) -> None:
    """Runs uv or pip; what it said is the failure."""
    done = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the whole checkout: building in place would leave folders there."""
    source, target = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*UNTRACKED))
    if uv := find_uv():
        run_tool(uv, "build", "--wheel", "--out-dir", target, source)
    else:
        run_tool(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", target, source)
    (path,) = target.glob("jaxinfer-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment with the wheel, what it depends on and nothing else: no pip either."""
    environment = tmp_path_factory.mktemp("environment")
    run_tool(sys.executable, "-m", "venv", "--without-pip", environment)
    python, constraints = environment / "bin/python", ROOT / "constraints.txt"
    if uv := find_uv():
        run_tool(uv, "pip", "install", "--python", python, "-c", constraints, wheel)
    else:
        pip = (sys.executable, "-m", "pip", "--python", python)
        run_tool(*pip, "install", "-c", constraints, wheel)
    yield environment
    shutil.rmtree(environment)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and the caches of the programs that run there."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tiny.gguf").write_bytes(llama_bytes())
    return folder


def start(command: list[str], folder: Path, path: str = "/usr/bin:/bin") -> subprocess.Popen[str]:
    """A program in ``folder`` that knows neither this process's paths nor its environment."""
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": path, "XDG_CACHE_HOME": str(folder), "COLUMNS": "100"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    return process.returncode, out, err


def is_left_out(path: Path) -> bool:
    return path.is_dir() or "__pycache__" in path.parts or path.name.startswith(".")


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = {name for name in names if re.match(r"jaxinfer-[^/]+\.dist-info/", name)}
    wanted = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if not is_left_out(path)
    }
    assert names - metadata == wanted
    # Other wheels may have a folder called scripts too: the last one installed would overwrite it.
    assert {name.partition("/")[0] for name in names - metadata} == PACKAGES
    assert any(name.endswith("entry_points.txt") for name in metadata)
    assert any(name.endswith("LICENSE") for name in metadata)
    # Type checkers read a package's annotations only where it says that it has some (PEP 561).
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_every_entry_point_is_its_script(installed: Path, elsewhere: Path) -> None:
    assert {"jaxinfer-serve", "jaxinfer-generate", "jaxinfer-bench"} <= set(PROGRAMS)
    for name, target in PROGRAMS.items():
        script = ROOT / "scripts" / f"{target.partition(':')[0].rpartition('.')[2]}.py"
        ours = start([str(installed / "bin" / name), "--help"], elsewhere)
        theirs = start([sys.executable, str(script), "--help"], elsewhere)
        status, out, err = finish(ours)
        assert (status, err) == (0, ""), name
        assert out.startswith(f"usage: {name} "), name
        # All but the usage, which is indented by the program's name.
        assert out.split("\n\n", 1)[1] == finish(theirs)[1].split("\n\n", 1)[1], name


CLIENT = """
import sys
import serving
from serving.client import Client

with Client(sys.argv[1]) as client:
    client.wait_until_serving(10)
    completion = client.complete("abc", max_tokens=5, ignore_eos=True)
    print(len(completion.token_ids), client.model_info().model_name, serving.__file__)
"""


def test_the_installed_server_serves_elsewhere(installed: Path, elsewhere: Path) -> None:
    command = [str(installed / "bin/jaxinfer-serve"), *SIZES, "--port", "0"]
    server = start([*command, "--model", "tiny.gguf"], elsewhere)
    try:
        assert server.stdout
        line = server.stdout.readline()
        match = re.fullmatch(r"SERVING tiny on .* at (127\.0\.0\.1:\d+)\n", line)
        assert match, line
        client = start([str(installed / "bin/python"), "-c", CLIENT, match[1]], elsewhere)
        status, out, err = finish(client)
        assert (status, err) == (0, "")
        count, name, path = out.split()
        assert (count, name) == ("5", "tiny")
        assert Path(path).is_relative_to(installed)
        server.send_signal(signal.SIGTERM)
        out, _ = server.communicate(timeout=HANG_SECONDS)
        assert (server.returncode, out) == (0, "stopped\n")
    finally:
        server.kill()
        server.communicate()


def test_generate_and_bench_run_elsewhere(installed: Path, elsewhere: Path) -> None:
    flags = [*SIZES, "--model", "tiny.gguf", "--quiet", "--json"]
    generate = [str(installed / "bin/jaxinfer-generate"), *flags, "--max-tokens", "3", "abc"]
    status, out, err = finish(start(generate, elsewhere))
    assert (status, err) == (0, "")
    assert json.loads(out)["usage"]["prompt_tokens"] == 1
    bench = [str(installed / "bin/jaxinfer-bench"), "offline", *flags, "--num-prompts", "1"]
    status, out, err = finish(start([*bench, "--prompt-len", "9", "--output-len", "3"], elsewhere))
    assert (status, err) == (0, "")
    assert json.loads(out)["prompt_len"] == 9


def test_without_uv_and_pip_the_missing_tool_is_named(installed: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"  # a PATH without programs: uv may lie in /usr/bin
    nothing.mkdir()
    command = [str(installed / "bin/jaxinfer-generate"), "--cpu", "--quiet", "abc"]
    status, out, err = finish(start(command, tmp_path, path=str(nothing)))
    assert (status, out) == (1, "")
    named = r"error: cannot fetch \S+ \(\S+\): neither uv nor pip is installed for \S+\. .*GGUF.*\n"
    assert re.fullmatch(named, err)
