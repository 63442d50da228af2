"""Every command and every program that README.md shows is run: here, or where a table says.

Commands are read from the README, so that a new one is run without a line in this file. What cannot
be run here needs one in ``ELSEWHERE``. Fences without a language hold commands: with ``$`` before
each, and output between them, or nothing but commands. ``$ cat FILE`` shows a file of the reader's.
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

from tests.checkpoints.gguf.tiny_gguf import UINT32, llama_bytes
from tests.patience import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What a command matches -> a file, and a line in it, that runs such a command.
ELSEWHERE = {
    r"make (setup|test-all)": (".ci/run", "phase make \\1"),
    r"make (test)": ("Makefile", "test-thorough: "),
    r"make (lint)": (".ci/run", "phase .venv/bin/ruff check"),
    r"make \w+ EXTRAS=gpu\b.*": ("tests/gpu/test_serve.py", '"scripts/serve.py"), "--gpu"'),
    r"make (test-aot|aot)": ("Makefile", "--no-print-directory test-aot"),
    # Minutes, for what they compile.
    r"\.venv-aot/bin/python scripts/serve\.py .*--compile-only": (
        "tests/aot/test_compile_only.py",
        '"--compile-only"',
    ),
    r"make (?:peers|bench-peers)\b.*": (
        "tests/jaxinfer_entrypoints/benchmarks/test_peers.py",
        "def test_make_",
    ),
    r".*bench(?:\.py)? invariance\b.*": (
        "tests/jaxinfer_entrypoints/test_bench.py",
        'run("bench", "invariance"',
    ),
    r".*bench(?:\.py)? load\b.*": (
        "tests/jaxinfer_entrypoints/test_bench.py",
        'run("bench", "load"',
    ),
    r"uv build --wheel": ("tests/test_wheel.py", 'run_tool(uv, "build", "--wheel"'),
    r"(?:uv )?pip install .*": ("tests/test_wheel.py", "def test_the_installed_server"),
}
# No machine that the project has can run these: the paragraph has to say so.
NOWHERE = r"make \w+ EXTRAS=tpu\b.*|python scripts/tune.py .*"
ADMISSION = re.compile(r"\bnot (yet )?(been )?run\b|\bnever (been )?run\b")

INLINE = re.compile(
    r"(make|python3?|uv|pip|source|git|bash|curl|jaxinfer-\w+|\.venv/bin/\S+|[\w/]+\.py) +\S"
)
ADDRESS = "127.0.0.1:50051"  # where the README's server listens
SERVES = re.compile(r"make serve\b|(\S*python3? scripts/serve\.py|jaxinfer-serve)\b")
ENDS = re.compile(r"--(help|explain-sharding)\b")
TALKS = re.compile(
    r"(\bchat\.py|jaxinfer-chat|\bbench(\.py)? serve)\b"
)  # to a server, at ADDRESS by default
SENTENCES = [{"prompt": "The sea is"}, {"messages": [{"role": "user", "content": "Hello"}]}]
UNTRACKED = (".*", "__pycache__", "build", "dist", "*.egg-info")


@dataclass(frozen=True)
class Command:
    """A command line, the output shown below it, and the paragraph where it stands."""

    text: str
    output: str = ""
    paragraph: str = ""


def blocks_of(readme: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)


def commands_of(readme: str) -> list[Command]:
    """All commands, those in backticks too; each once, with its output where one is shown."""
    found: list[Command] = []
    for language, content in blocks_of(readme):
        if language in ("", "sh", "bash", "shell", "console"):
            found += (
                prompted(content) if re.search(r"^\$ ", content, re.MULTILINE) else bare(content)
            )
    prose = re.sub(r"^```.*?^```$", "", readme, flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", prose):
        for text in re.findall(r"`([^`]+)`", paragraph):
            if INLINE.match(text):
                # The prose may call a script by its name alone.
                named = re.match(r"\w+\.py", text)
                is_script = named and (ROOT / "scripts" / named[0]).is_file()
                found.append(
                    Command(f"python scripts/{text}" if is_script else text, "", paragraph)
                )
    unique: dict[str, Command] = {}
    for command in found:
        known = unique.setdefault(command.text, command)
        output, paragraph = known.output or command.output, known.paragraph or command.paragraph
        unique[command.text] = Command(command.text, output, paragraph)
    return list(unique.values())


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s+)#\s.*$", "", line).strip()


def bare(content: str) -> list[Command]:
    """Every line is a command; a backslash at the end goes on in the next one."""
    lines = map(without_comment, re.sub(r"\\\n\s*", "", content).splitlines())
    return [Command(line) for line in lines if line]


def prompted(content: str) -> list[Command]:
    """Lines after ``$`` are commands, others the output of the one above."""
    parts = re.split(r"^\$ ", re.sub(r"\\\n(> )?\s*", "", content), flags=re.MULTILINE)
    assert not parts[0].strip(), f"output above the first command: {parts[0]!r}"
    lines = [part.partition("\n") for part in parts[1:]]
    return [Command(without_comment(line), output) for line, _, output in lines]


def shown_files(commands: list[Command]) -> dict[str, str]:
    """Name -> content of the files that the reader is to write."""
    cats = {command: re.fullmatch(r"cat ([\w.-]+)", command.text) for command in commands}
    shown = {match[1]: command.output for command, match in cats.items() if match}
    return {name: content for name, content in shown.items() if not (ROOT / name).exists()}


def place_of(command: Command) -> tuple[str, str] | None:
    """The file and line that run such a command; None is here. Asserts that they are there."""
    for pattern, (file, line) in ELSEWHERE.items():
        if match := re.fullmatch(pattern, command.text):
            line = match.expand(line) if match.groups() else line
            assert line in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {line!r}"
            return file, line
    if re.fullmatch(NOWHERE, command.text):
        assert ADMISSION.search(command.paragraph), f"{command.text}: say that it has not been run"
        return "README.md", command.paragraph
    return None


COMMANDS = commands_of(README)
FILES = shown_files(COMMANDS)
PROGRAMS = {
    f"program_{number}.py": content
    for number, (language, content) in enumerate(blocks_of(README))
    if language in ("python", "py")
}
HERE = [
    *(
        command
        for command in COMMANDS
        if not place_of(command) and command.text not in {f"cat {name}" for name in FILES}
    ),
    *(Command(f"python {name}") for name in PROGRAMS),
]
FILES |= PROGRAMS


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, as the reader has it after ``make setup``."""
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*UNTRACKED))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def without_make(environment: Mapping[str, str]) -> dict[str, str]:
    """Leaves out what the tests' own ``make test`` hands down: others would speak of folders."""
    return {name: value for name, value in environment.items() if not name.startswith("MAKE")}


def start(text: str, checkout: Path) -> subprocess.Popen[str]:
    """A command of the README in a shell, in a process group of its own."""
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


def finish(process: subprocess.Popen[str], seconds: float = HANG_SECONDS) -> tuple[str, str]:
    """Standard output and standard error, when it has ended."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def start_server(text: str, checkout: Path) -> tuple[subprocess.Popen[str], str]:
    """A command that serves, at a free port instead of its own; and its line SERVING."""
    if "--port" in text:
        text = re.sub(r"--port[ =]\d+", "--port 0", text)
    elif text.startswith("make "):
        quoted = re.sub(r"ARGS=(['\"])", r"ARGS=\1--port 0 ", text)
        text = quoted if quoted != text else f'{text} ARGS="--port 0"'
    else:
        text += " --port 0"
    # Its progress would fill a pipe that nobody reads.
    server = start(f"{text} 2> serve.log", checkout)
    assert server.stdout
    line = server.stdout.readline()
    if not line.startswith("SERVING"):
        finish(server)
        pytest.fail(f"{text}: {line}{(checkout / 'serve.log').read_text()[-2000:]}")
    return server, line


def stop_server(server: subprocess.Popen[str]) -> None:
    """As whoever presses Ctrl-C does."""
    os.killpg(server.pid, signal.SIGINT)
    out, _ = finish(server)
    assert out == "stopped\n"


@pytest.fixture(scope="module")
def address(checkout: Path) -> Iterator[str]:
    """A server of the default model, which the README's clients find instead of their own."""
    server, line = start_server("python scripts/serve.py", checkout)
    yield line.split()[-1]
    stop_server(server)


def prepare(text: str, checkout: Path) -> str:
    """Writes what a command reads and the reader would have; benchmarks get a tiny model."""
    for name in re.findall(r"--input[ =](\S+\.jsonl)", text):
        (checkout / name).write_text("".join(json.dumps(line) + "\n" for line in SENTENCES))
    models = [*re.findall(r"--model[ =](\S+\.gguf)", text), "tiny.gguf"]
    for name in models:
        (checkout / name).write_bytes(llama_bytes(llama__context_length=(UINT32, 8192)))
    if re.search(r"\bbench(\.py)? (?!serve)\w", text) and "--model" not in text:
        text += " --model tiny.gguf"
    return text


def same(output: str, shown: str) -> bool:
    """Tells whether the output is the one shown, in which a line ``...`` is any lines."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)]
    return re.fullmatch(r"(?:.*\n)*".join(parts), output) is not None


@pytest.mark.model
@pytest.mark.parametrize("command", HERE, ids=lambda command: command.text)
@pytest.mark.thorough("the README's commands")
def test_a_command_runs(command: Command, checkout: Path, request: pytest.FixtureRequest) -> None:
    text = prepare(command.text, checkout)
    if SERVES.match(text) and not ENDS.search(text):
        server, line = start_server(text, checkout)
        stop_server(server)
        for shown in re.findall(r"^SERVING .*$", command.output, re.MULTILINE):
            assert line.rpartition(":")[0] == shown.rpartition(":")[0]
        return
    if TALKS.search(text) and "--address" not in text:
        text = TALKS.sub(rf"\g<0> --address {ADDRESS}", text)
    shown_by = [content for name, content in FILES.items() if name in text.split()]
    if ADDRESS in text + "".join(shown_by):
        address = request.getfixturevalue("address")
        text = text.replace(ADDRESS, address)
        for name, content in FILES.items():
            (checkout / name).write_text(content.replace(ADDRESS, address))
    process = start(text, checkout)
    out, err = finish(process)
    assert process.returncode == 0, f"{out[-1000:]}{err[-2000:]}"
    # What a model says is the same everywhere; figures and times are not.
    if command.output and (shown_by or re.search(r"\bgenerate\b", text)):
        assert same(out, command.output), out
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


def test_every_flag_exists() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "jaxinfer_entrypoints").rglob("*.py"))
    flags = set(re.findall(r"`(--[a-z-]+)", README))
    assert flags
    assert {flag for flag in flags if f'"{flag}"' not in sources} == set()


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
    commands = commands_of(SAMPLE)
    assert [command.text for command in commands] == [
        "cat x.py",
        "python x.py",
        'python a.py --flag "two words"',
        "make all",
        "python scripts/serve.py --cpu",
        "make serve EXTRAS=tpu",
    ]
    assert commands[1].output == "1\n"
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
    assert same("a\nb\nc\n", "a\n...\nc\n")
    assert same("a\nc\n", "a\n...\nc\n")
    assert not same("a\nb\n", "a\n")
    assert not same("a\nb\nd\n", "a\n...\nc\n")
