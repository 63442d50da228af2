"""The lint that docstrings do not begin with question words."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.check_docstrings import PACKAGES, ROOT, forbidden_docstrings

WORDS = ("What", "Which", "Whether", "Of", "Where", "When", "How", "Who", "Why")
TOOL = ROOT / "tools" / "check_docstrings.py"


def run(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *paths], capture_output=True, text=True)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("spelling", [str.capitalize, str.lower, str.upper])
def test_question_words_are_found(word: str, spelling: Callable[[str], str]) -> None:
    source = f'def f() -> None:\n    """{spelling(word)} it does."""\n'
    assert list(forbidden_docstrings(source)) == [(2, f"{spelling(word)} it does.")]


@pytest.mark.parametrize(
    "text",
    ["Whatever it does.", "Office hours.", "However.", "Returns what it does.", "", "'What'"],
)
def test_whole_words_at_the_beginning_count(text: str) -> None:
    assert list(forbidden_docstrings(f'"""{text}"""\n')) == []


def test_modules_classes_functions_and_methods_are_looked_at() -> None:
    source = '''"""What a module is.

Which is more than a line.
"""


class Outer:
    """
    How a class is.
    """

    text = """What a text is."""  # no docstring

    async def method(self) -> None:
        """Where a method is."""

        def inner() -> None:
            """Why a function is."""
'''
    assert sorted(forbidden_docstrings(source)) == [
        (1, "What a module is."),
        (8, "How a class is."),
        (15, "Where a method is."),
        (18, "Why a function is."),
    ]


def test_each_is_printed_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text('"""A module."""\n')
    (tmp_path / "made_pb2.py").write_text('"""What a generator wrote."""\n')
    assert run(tmp_path).returncode == 0
    bad = tmp_path / "bad.py"
    bad.write_text('"""A module."""\n\n\ndef f() -> None:\n    """Whether it is so."""\n')
    found = run(tmp_path)
    assert (found.returncode, found.stderr) == (1, "")
    assert found.stdout == f"{bad}:5: Whether it is so.\n"


def test_all_packages_are_checked() -> None:
    assert {path.parent.name for path in ROOT.glob("[a-z]*/*.py")} <= set(PACKAGES)


@pytest.mark.parametrize("name", ["Makefile", ".ci/run"])
def test_lint_and_ci_run_it(name: str) -> None:
    command = r"^.*(python|PYTHON\)) tools/check_docstrings\.py$"
    assert re.search(command, (ROOT / name).read_text(), re.MULTILINE)
