"""README.md and docs/*.md as the tests read them: their commands, and where each of them is run.

Commands are read from the pages, so that a new one is run without a line here. What cannot be run
by ``tests/test_readme.py`` needs one in ``ELSEWHERE``. Fences without a language hold commands:
with ``$`` before each, and output between them, or nothing but commands. ``$ cat FILE`` shows a
file of the reader's.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A pattern of commands -> a file, and a line in it, that runs such a command.
ELSEWHERE = {
    r"make (setup|test-all)": (".ci/run", "phase make \\1"),
    r"make (test-aot|aot)": ("Makefile", "$(MAKE) --no-print-directory test-aot"),
    r"make test": ("Makefile", "$(MAKE) --no-print-directory test-thorough"),
    r"make soak\b.*": ("tests/serving/test_soak.py", "soak(Server("),
    r"make (lint)": (".ci/run", "phase .venv/bin/ruff check"),
    r"make \w+ EXTRAS=gpu\b.*": ("tests/gpu/test_serve.py", '"scripts/serve.py"), "--gpu"'),
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
    r".*evaluate(?:\.py)? .*--formats .*": (
        "tests/jaxinfer_entrypoints/test_evaluate.py",
        '*flags, "--formats", *formats)',
    ),
    r".*bench(?:\.py)? offline\b.*": (
        "tests/jaxinfer_entrypoints/test_bench.py",
        'run("bench", "offline"',
    ),
    r".*bench(?:\.py)? load\b.*": (
        "tests/jaxinfer_entrypoints/test_bench.py",
        'run("bench", "load"',
    ),
    r".*bench(?:\.py)? host\b.*": (
        "tests/jaxinfer_entrypoints/test_bench.py",
        'run("bench", "host"',
    ),
    r".*bench(?:\.py)? programs\b.*": (
        "tests/jaxinfer_entrypoints/test_drafts.py",
        '"bench", "programs"',
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


@dataclass(frozen=True)
class Page:
    """A page by its path from the checkout's root, and its Markdown."""

    name: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command line, the output shown below it, the paragraph where it stands, and its page."""

    text: str
    output: str = ""
    paragraph: str = ""
    page: str = "README.md"


def read_page(path: Path) -> Page:
    """Returns the page of this file."""
    return Page(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


def pages_with_commands() -> list[Page]:
    """Returns README.md and, in order of their names, docs/*.md."""
    return [read_page(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Returns language and content of each fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose_of(text: str) -> str:
    """Returns the text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands_of(page: Page) -> list[Command]:
    """Returns all commands, those in backticks too; each once, with its output if one is shown."""
    found: list[Command] = []
    for language, content in blocks_of(page.text):
        if language in ("", "sh", "bash", "shell", "console"):
            found += (
                _prompted(content) if re.search(r"^\$ ", content, re.MULTILINE) else _bare(content)
            )
    for paragraph in re.split(r"\n\s*\n", prose_of(page.text)):
        for text in re.findall(r"`([^`]+)`", paragraph):
            if INLINE.match(text):
                # The prose may call a script by its name alone.
                named = re.match(r"\w+\.py", text)
                is_script = named and (ROOT / "scripts" / named[0]).is_file()
                found.append(
                    Command(f"python scripts/{text}" if is_script else text, "", paragraph)
                )
    return unique(
        [Command(command.text, command.output, command.paragraph, page.name) for command in found]
    )


def unique(commands: list[Command]) -> list[Command]:
    """Returns each command once, with the first output and the first paragraph that it has."""
    first: dict[str, Command] = {}
    for command in commands:
        known = first.setdefault(command.text, command)
        output, paragraph = known.output or command.output, known.paragraph or command.paragraph
        first[command.text] = Command(command.text, output, paragraph, known.page)
    return list(first.values())


def without_comment(line: str) -> str:
    """Returns a shell's line without the comment at its end."""
    return re.sub(r"(^|\s+)#\s.*$", "", line).strip()


def _bare(content: str) -> list[Command]:
    """Every line is a command; a backslash at the end goes on in the next one."""
    lines = map(without_comment, re.sub(r"\\\n\s*", "", content).splitlines())
    return [Command(line) for line in lines if line]


def _prompted(content: str) -> list[Command]:
    """Lines after ``$`` are commands, others the output of the one above."""
    parts = re.split(r"^\$ ", re.sub(r"\\\n(> )?\s*", "", content), flags=re.MULTILINE)
    assert not parts[0].strip(), f"output above the first command: {parts[0]!r}"
    lines = [part.partition("\n") for part in parts[1:]]
    return [Command(without_comment(line), output) for line, _, output in lines]


def shown_files(commands: list[Command]) -> dict[str, str]:
    """Returns name -> content of the files that the reader is to write."""
    cats = {command: re.fullmatch(r"cat ([\w.-]+)", command.text) for command in commands}
    shown = {match[1]: command.output for command, match in cats.items() if match}
    return {name: content for name, content in shown.items() if not (ROOT / name).exists()}


def place_of(command: Command) -> tuple[str, str] | None:
    """Returns the file and line that run such a command, None for test_readme.py itself.

    Asserts that the line is there.
    """
    for pattern, (file, line) in ELSEWHERE.items():
        if match := re.fullmatch(pattern, command.text):
            line = match.expand(line) if match.groups() else line
            assert line in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {line!r}"
            return file, line
    if re.fullmatch(NOWHERE, command.text):
        assert ADMISSION.search(command.paragraph), f"{command.text}: say that it has not been run"
        return command.page, command.paragraph
    return None


def is_alike(output: str, shown: str) -> bool:
    """Tells whether the output is the one shown, in which a line ``...`` stands for any lines."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)]
    return re.fullmatch(r"(?:.*\n)*".join(parts), output) is not None


def without_figures(text: str) -> str:
    """Returns the text with 0 for every number, one space for several, and no port."""
    return re.sub(r" +", " ", re.sub(r"\d[\d.,]*", "0", text))
