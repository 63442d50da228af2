"""Ctrl-C while a program starts, and a reader of its output that has gone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer_entrypoints.generate import json_line
from tests.patience import HANG_SECONDS

SCRIPTS = Path(__file__).parents[2] / "scripts"
# What keeps a program long enough to be interrupted: they all import most of it.
PROGRAMS = {
    "serve": ["--help"],
    "generate": ["--help"],
    "chat": ["--address", "127.0.0.1:1"],
    "bench": ["offline", "--help"],
    "evaluate": ["--help"],
    "doctor": [],
    "tune": ["--help"],
}


def start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def interrupt_while_importing(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Ctrl-C once the first of our modules is there, however long Python took to get so far.

    The process must say on stderr what it imports (``-X importtime``); returns its exit status,
    what it printed, and what else it said.
    """
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.endswith(" jaxinfer_entrypoints.entry\n"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=HANG_SECONDS)
    lines = [*said, *errors.splitlines(keepends=True)]
    return process.returncode, output, "".join(s for s in lines if not s.startswith("import time:"))


def test_output_that_cannot_be_printed_is_replaced() -> None:
    program = (
        "from jaxinfer_entrypoints.entry import run_main\n"
        "run_main(lambda: print('caf\\u00e9', end='\\n'))\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf?\n", b"")


def test_json_is_escaped_where_it_cannot_be_printed() -> None:
    value = {"text": "caf\u00e9 \u6d77"}
    for encoding in ("ascii", "latin-1", "UTF8", None):
        line = json_line(value, encoding)
        assert json.loads(line) == value
        assert line.isascii() == (encoding in ("ascii", "latin-1"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_interrupt_during_imports_is_silent(name: str) -> None:
    command = [sys.executable, "-X", "importtime", str(SCRIPTS / f"{name}.py"), *PROGRAMS[name]]
    with start(command) as process:
        assert interrupt_while_importing(process) == (130, "", "")


def test_interrupt_of_an_installed_program_is_silent(tmp_path: Path) -> None:
    program = tmp_path / "jaxinfer-serve"
    program.write_text(
        "import sys\nfrom jaxinfer_entrypoints.serve import main\nsys.exit(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", str(program)],
        text=True,
        env={"PYTHONPATH": str(SCRIPTS.parent), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert interrupt_while_importing(process) == (130, "", "")


def test_interrupt_reaches_the_program_once_it_runs() -> None:
    source = (
        "import sys; sys.argv[0] = 'x'\n"
        f"import __main__; __main__.__file__ = {str(SCRIPTS / 'x.py')!r}\n"
        "from jaxinfer_entrypoints.entry import run_main\n"
        "import time\n"
        "def main():\n"
        "    try:\n"
        "        print('running', flush=True); time.sleep(3600)\n"
        "    finally:\n"
        "        print('tidied', flush=True)\n"
        "run_main(main)\n"
    )
    with start([sys.executable, "-c", source]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, output, errors) == (130, "tidied\n", "")


def test_this_process_is_none_of_the_programs() -> None:
    """Importers of a script keep their own way of being interrupted."""
    from jaxinfer_entrypoints import entry

    assert not entry._is_program()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_has_gone_is_no_error() -> None:
    source = (
        "from jaxinfer_entrypoints.entry import run_main\n"
        "def main():\n"
        "    for number in range(100_000): print(number)\n"
        "run_main(main)\n"
    )
    with start([sys.executable, "-c", source]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == 141
