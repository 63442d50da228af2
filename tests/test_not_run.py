"""The line at the end of ``make test`` on what was left out."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFTEST = """
from tests.not_run import NotRun

def pytest_configure(config):
    config.addinivalue_line("markers", "thorough(subject): left out")
    config.pluginmanager.register(NotRun())
"""
TESTS = """
import pytest

def test_quick(): pass

@pytest.mark.thorough("the wheel")
def test_wheel(): pass

@pytest.mark.thorough("a long search")
@pytest.mark.parametrize("case", range(3))
def test_search(case): pass
"""


def last_line(folder: Path, *arguments: str) -> str:
    """Returns the last line of a run of pytest over ``TESTS``."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("processes", [[], ["-n", "2"]], ids=["one process", "two"])
def test_what_was_left_out_is_one_line(tmp_path: Path, processes: list[str]) -> None:
    line = last_line(tmp_path, "-m", "not thorough", *processes)
    assert line == ("not run: 4 thorough tests (a long search, the wheel); make test-all runs them")
    assert "not run" not in last_line(tmp_path, *processes)
