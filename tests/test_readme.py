"""Every command and every program that README.md and docs/*.md show is run: here, or elsewhere.

Those of README.md run as they stand, the others with a tiny model where they need one. The server
that README.md starts is started once, and is the one that all clients on all pages talk to.
``tests/pages.py`` says how commands are found, and where those are run that are not run here.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import pages
from tests.checkpoints.gguf.tiny_gguf import UINT32, llama_bytes
from tests.pages import (
    ELSEWHERE,
    ROOT,
    Command,
    Page,
    blocks_of,
    commands_of,
    is_alike,
    pages_with_commands,
    place_of,
    shown_files,
    without_figures,
)
from tests.patience import HANG_SECONDS

ADDRESS = "127.0.0.1:50051"  # where the pages' server listens
SERVES = re.compile(r"make serve\b|(\S*python3? scripts/serve\.py|jaxinfer-serve)\b")
ENDS = re.compile(r"--(help|explain-sharding)\b")
# To a server, at ADDRESS by default.
TALKS = re.compile(r"(\bchat\.py|jaxinfer-chat|\bbench(\.py)? serve)\b")
LOADS = re.compile(r"\b(generate|evaluate|bench)(\.py)?\b")
SENTENCES = [{"prompt": "The sea is"}, {"messages": [{"role": "user", "content": "Hello"}]}]
UNTRACKED = (".*", "__pycache__", "build", "dist", "*.egg-info")
TINY = "tiny.gguf"
# However little memory others leave. README.md serves with the same sizes: programs are shared.
TINY_FLAGS = f"--model {TINY} --kv-memory 512MiB"

PAGES = pages_with_commands()
COMMANDS = pages.unique([command for page in PAGES for command in commands_of(page)])
FILES = shown_files(COMMANDS)
PROGRAMS = {
    f"program_{number}.py": content
    for number, (language, content) in enumerate(
        block for page in PAGES for block in blocks_of(page.text)
    )
    if language in ("python", "py")
}
# The first of them is the server that README.md starts.
SERVERS = [command for command in COMMANDS if SERVES.match(command.text) and not place_of(command)]
HERE = [
    *(
        command
        for command in COMMANDS
        if not place_of(command) and command.text not in {f"cat {name}" for name in FILES}
    ),
    *(Command(f"python {name}") for name in PROGRAMS),
]
FILES |= PROGRAMS


@dataclass(frozen=True)
class Server:
    """A server that listens, and the line that said so."""

    process: subprocess.Popen[str]
    line: str
    log: Path

    @property
    def address(self) -> str:
        return self.line.split()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, as the reader has it after ``make setup``, and the tiny model."""
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*UNTRACKED))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / TINY).write_bytes(llama_bytes(llama__context_length=(UINT32, 2048)))
    return folder


@pytest.fixture(scope="module")
def server(checkout: Path) -> Iterator[Server]:
    """The server that README.md starts, of the default model."""
    server = start_server(SERVERS[0].text, checkout)
    yield server
    stop_server(server)


def without_make(environment: Mapping[str, str]) -> dict[str, str]:
    """Leaves out what the tests' own ``make test`` hands down: others would speak of folders."""
    return {name: value for name, value in environment.items() if not name.startswith("MAKE")}


def start(text: str, checkout: Path) -> subprocess.Popen[str]:
    """Starts a command of a page in a shell, in a process group of its own."""
    # The environment is there already; what make would install is installed by .ci/run.
    made = [".venv/.runtime", ".venv/.development", ".venv/bin/python"]
    text = re.sub(r"^make ", f"make {' '.join(f'-o {name}' for name in made)} ", text)
    # The shell becomes the program, where it is one.
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=checkout,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **without_make(os.environ),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Returns standard output and standard error, when it has ended."""
    try:
        return process.communicate(timeout=HANG_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def start_server(text: str, checkout: Path) -> Server:
    """Starts a command that serves, at a free port instead of its own."""
    if "--port" in text:
        text = re.sub(r"--port[ =]\d+", "--port 0", text)
    else:
        text = with_flags(text, "--port 0")
    # Its progress would fill a pipe that nobody reads.
    log = checkout / "serve.log"
    process = start(f"{text} 2> {log.name}", checkout)
    assert process.stdout
    line = process.stdout.readline()
    if not line.startswith("SERVING"):
        os.killpg(process.pid, signal.SIGTERM)
        finish(process)
        pytest.fail(f"{text}: {line}{log.read_text()[-2000:]}")
    return Server(process, line, log)


def stop_server(server: Server) -> None:
    """Stops it as whoever presses Ctrl-C does."""
    os.killpg(server.process.pid, signal.SIGINT)
    out, _ = finish(server.process)
    assert out == "stopped\n"


def with_flags(text: str, flags: str) -> str:
    """Returns a command with more flags for the program that it starts."""
    if not text.startswith("make "):
        program, redirection, rest = re.split(r"( [<>|] |$)", text, maxsplit=1)
        return f"{program} {flags}{redirection}{rest}"
    quoted = re.sub(r"ARGS=(['\"])", rf"ARGS=\1{flags} ", text)
    return quoted if quoted != text else f'{text} ARGS="{flags}"'


def prepare(command: Command, checkout: Path) -> str:
    """Writes what a command reads and the reader would have; returns it with the tiny model.

    The models that a command names are made of it. Where one is named by nobody, README.md's
    commands and those whose output is shown have the default model.
    """
    text = command.text
    for name in re.findall(r"--(?:input|prompts)[ =](\S+\.jsonl)", text):
        (checkout / name).write_text("".join(json.dumps(line) + "\n" for line in SENTENCES))
    for name in re.findall(r"([\w-]+\.gguf)\b", text):
        shutil.copy(checkout / TINY, checkout / name)
    loads = (SERVES.match(text) and not ENDS.search(text)) or (
        LOADS.search(text) and not TALKS.search(text)
    )
    is_as_it_stands = command.page == "README.md" or command.output or "--model" in text
    return with_flags(text, TINY_FLAGS) if loads and not is_as_it_stands else text


def check_server(command: Command, server: Server) -> None:
    """Compares what a page shows of a start with what was printed, all but the figures."""
    printed = without_figures(server.log.read_text() + server.line)
    # What was made or fetched before is not made again here.
    shown = re.sub(r"^(setup: .*|download .*|total .*)\n", "...\n", command.output, flags=re.M)
    assert is_alike(printed, without_figures(shown) or "...\n"), printed


@pytest.mark.model
@pytest.mark.thorough("the commands of README and docs")
@pytest.mark.parametrize("command", HERE, ids=lambda command: command.text)
def test_a_command_runs(command: Command, checkout: Path, request: pytest.FixtureRequest) -> None:
    if command is SERVERS[0]:
        check_server(command, request.getfixturevalue("server"))
        return
    text = prepare(command, checkout)
    if command in SERVERS and not ENDS.search(text):
        server = start_server(text, checkout)
        stop_server(server)
        check_server(command, server)
        return
    if TALKS.search(text) and "--address" not in text:
        text = TALKS.sub(rf"\g<0> --address {ADDRESS}", text)
    shown_by = [content for name, content in FILES.items() if name in text.split()]
    if ADDRESS in text + "".join(shown_by):
        address = request.getfixturevalue("server").address
        text = text.replace(ADDRESS, address)
        shown_by = [content.replace(ADDRESS, address) for content in shown_by]
    for name, content in zip(
        [name for name in FILES if name in text.split()], shown_by, strict=True
    ):
        (checkout / name).write_text(content)
    process = start(text, checkout)
    out, err = finish(process)
    assert process.returncode == 0, f"{out[-1000:]}{err[-2000:]}"
    # What a model says is the same everywhere; figures and times are not.
    if command.output and (shown_by or re.search(r"\bgenerate\b", text)):
        assert is_alike(out, command.output), out
    for name in re.findall(r"(?:>|--plot) *(\S+)", text):
        assert (checkout / name).stat().st_size > 0, name


SCRIPTS = [c.text for c in COMMANDS if re.match(r"\S*python3? scripts/", c.text)]


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_script_takes_its_arguments(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those as well that run elsewhere, with other arguments."""
    _, script, *arguments = shlex.split(re.sub(r" [<>|&].*", "", text))
    module = importlib.import_module(f"jaxinfer_entrypoints.{Path(script).stem}")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    status: object = 0
    try:
        module.parse_arguments()
    except SystemExit as exit_:
        status = exit_.code  # 0 for --help
    assert status == 0


def test_the_pages_start_with_a_server_that_is_shown() -> None:
    assert SERVERS[0].page == "README.md"
    assert "SERVING" in SERVERS[0].output
    assert "--model" not in SERVERS[0].text


SAMPLE = """
Run `serve.py --cpu`, then `make serve EXTRAS=tpu`. This has not been run.

```
$ cat x.py
print(1)
$ python x.py  # says it
1
```

```
python a.py \\
    --flag "two words"  # why
make all
```

```text
python is not run
```
"""


def test_commands_are_found_wherever_they_stand() -> None:
    commands = commands_of(Page("docs/sample.md", SAMPLE))
    assert [command.text for command in commands] == [
        "cat x.py",
        "python x.py",
        'python a.py --flag "two words"',
        "make all",
        "python scripts/serve.py --cpu",
        "make serve EXTRAS=tpu",
    ]
    assert commands[1].output == "1\n"
    assert {command.page for command in commands} == {"docs/sample.md"}
    assert shown_files(commands) == {"x.py": "print(1)\n"}
    assert place_of(commands[3]) is None
    assert place_of(commands[5])
    with pytest.raises(AssertionError, match="say that it has not been run"):
        place_of(Command("make serve EXTRAS=tpu", "", "It runs."))


def test_commands_elsewhere_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of(Command("make test-all")) == (".ci/run", "phase make test-all")
    monkeypatch.setitem(ELSEWHERE, "make fun", (".ci/run", "phase make fun"))
    with pytest.raises(AssertionError, match=r"\.ci/run has no 'phase make fun'"):
        place_of(Command("make fun"))


def test_output_is_compared_up_to_dots() -> None:
    assert is_alike("a\nb\nc\n", "a\n...\nc\n")
    assert is_alike("a\nc\n", "a\n...\nc\n")
    assert not is_alike("a\nb\n", "a\n")
    assert not is_alike("a\nb\nd\n", "a\n...\nc\n")


def test_figures_are_not_compared() -> None:
    assert without_figures("load   0.64 s  182 tensors\n") == without_figures(
        "load  9.1 s  3 tensors\n"
    )
    assert without_figures("load 1 s\n") != without_figures("compile 1 s\n")


def test_flags_go_to_the_program() -> None:
    assert with_flags("make serve", "--x 1") == 'make serve ARGS="--x 1"'
    assert with_flags('make serve ARGS="--y"', "--x 1") == 'make serve ARGS="--x 1 --y"'
    assert with_flags("python a.py b > c", "--x 1") == "python a.py b --x 1 > c"
