"""notebooks/colab_tpu.ipynb: run from top to bottom on CPU, and what its first cells refuse."""

import builtins
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.patience import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks/colab_tpu.ipynb"


def read() -> Any:
    """The notebook as it is committed; raises when it is not valid."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def source(name: str) -> str:
    """The code of the cell of this id."""
    return next(cell.source for cell in read().cells if cell.id == name)


def run_cells(*names: str) -> dict[str, Any]:
    """Runs cells here, one after the other; returns their names."""
    namespace: dict[str, Any] = {"__builtins__": builtins}
    for name in names:
        exec(compile(source(name), name, "exec"), namespace)
    return namespace


def test_it_is_committed_without_outputs() -> None:
    for cell in read().cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id


def test_no_program_is_started_once_this_process_has_jax() -> None:
    """A TPU belongs to one process at a time, and to this one until it ends."""
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.id for cell in cells if "LLM(" in cell.source] == ["llm"] == [cells[-1].id]
    assert "subprocess" not in cells[-1].source


@pytest.mark.thorough("the notebook")
@pytest.mark.model
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Jupyter and the notebook write stays here, and Jupyter reads nobody's settings.
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    notebook = read()
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=round(HANG_SECONDS), resources=resources).execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    printed = {
        name: "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for name, cell in cells.items()
    }
    assert not any(
        output.get("name") == "stderr" for cell in cells.values() for output in cell.outputs
    )
    assert printed["checkout"] == f"{ROOT}\n"
    assert printed["devices"] == "1 x cpu\nflags: --cpu\n"
    assert re.search(r"^SERVING smollm2-135m-instruct on cpu ", printed["serve"], re.MULTILINE)
    text, _, end = printed["generate"].partition("\n\n")
    assert "Gravity" in text
    assert end == "40 tokens, length\n"
    first, second = re.findall(r"\((\d+) prompt tokens, (\d+) cached\)", printed["chat"])
    assert int(second[0]) > int(first[0]) + 10
    assert int(second[1]) >= int(first[0]) // 16 * 16 > 0
    assert printed["stop"] == "stopped 0\n"
    answers = re.findall(
        r"^(The|\[Message|def)\b.*\n([^\[]+)\n\[\w+\]$", printed["llm"], re.MULTILINE
    )
    assert [prompt for prompt, _ in answers] == ["The", "[Message", "def"]
    assert "Paris" in answers[0][1]
    speeds = re.findall(r"(\d+) at once: +([\d.]+) tokens/s", printed["bench"])
    assert [size for size, _ in speeds] == ["1", "4", "16"]
    assert all(float(speed) > 0 for _, speed in speeds)
    (plot,) = [output for output in cells["plot"].outputs if output.output_type == "display_data"]
    assert plot.data["image/png"].startswith("iVBORw0KGgo")


def test_another_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run_cells("python-version")
    code = compile(source("python-version"), "python-version", "exec")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "version_info", (3, 13, 1))
        with pytest.raises(RuntimeError, match=r"^jaxinfer needs Python 3\.12, this runtime has"):
            exec(code, {})


def test_a_checkout_around_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    assert run_cells("settings", "checkout")["CHECKOUT"] == ROOT


def test_elsewhere_the_repository_is_cloned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The first cell says so, not a later one: there is nothing to run before it.
    assert next(cell.id for cell in read().cells if cell.cell_type == "code") == "settings"
    with pytest.raises(RuntimeError, match=r"^there is no checkout around .*: set REPOSITORY in"):
        run_cells("settings")
    find = run_cells_with_checkout(tmp_path, monkeypatch)
    assert find(str(tmp_path / "origin")) == tmp_path / "work/jaxinfer"
    assert find("") == tmp_path / "work/jaxinfer"  # the next run finds the clone


def test_what_cannot_be_cloned_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = run_cells_with_checkout(tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=r"cannot clone '.*/nothing': .+"):
        find(str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match="cannot clone '--upload-pack=touch x'"):
        find("--upload-pack=touch x")
    git(tmp_path / "origin", "rm", "-q", "pyproject.toml")
    git(tmp_path / "origin", "commit", "-q", "-m", "empty", "--allow-empty")
    with pytest.raises(RuntimeError, match=r"'.*/origin' is not a repository of jaxinfer"):
        find(str(tmp_path / "origin"))


@pytest.mark.parametrize("absent", [None, "jaxinfer", "matplotlib"])
def test_what_is_missing_is_installed(absent: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program alone does not tell that the plot can be drawn."""
    monkeypatch.chdir(ROOT)
    namespace = run_cells("settings", "python-version", "checkout")
    installed, commands = metadata.distributions, []

    def distributions(name: str) -> Iterable[metadata.Distribution]:
        return [] if name == absent else installed(name=name)

    def install(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(metadata, "distributions", distributions)
    monkeypatch.setattr(subprocess, "run", install)
    monkeypatch.setattr("glob.glob", lambda _: [])  # no TPU, wherever this runs
    monkeypatch.setattr(Path, "exists", lambda _: True)  # the program is there
    exec(compile(source("install"), "install", "exec"), namespace)
    wanted = [[*(sys.executable, "-m", "pip", "install", "-c"), ROOT / "constraints.txt"]]
    assert [command[:-1] for command in commands] == (wanted if absent else [])
    assert all(command[-1] == f"{ROOT}[plot]" for command in commands)


def run_cells_with_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook's ``find_checkout``, in an empty folder beside a small repository."""
    origin, work = tmp_path / "origin", tmp_path / "work"
    origin.mkdir()
    work.mkdir()
    (origin / "pyproject.toml").write_text('[project]\nname = "jaxinfer"\n')
    git(origin, "init", "-q")
    git(origin, "add", "pyproject.toml")
    git(origin, "commit", "-q", "-m", "all of it")
    monkeypatch.chdir(ROOT)
    find = run_cells("settings", "checkout")["find_checkout"]
    monkeypatch.chdir(work)
    return find


def git(folder: Path, *arguments: str) -> None:
    """Runs git with a name of its own for commits."""
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)
