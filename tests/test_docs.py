"""Pages are short, and every path, module, name, flag and target that they mention exists."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.pages import ROOT, Page, prose_of, read_page

LISTED = [
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    "pallas_kernels/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
]
PAGES = [read_page(ROOT / name) for name in LISTED]
PACKAGES = ("checkpoints", "jaxinfer", "jaxinfer_entrypoints", "pallas_kernels", "serving")
SOURCES = (*PACKAGES, "scripts", "tools", "tests")
MOST_LINES = {"README.md": 130, "CONTRIBUTING.md": 70}
MOST_WORDS = {"ARCHITECTURE.md": 1300, "pallas_kernels/README.md": 900}
# Paths of the reader's, and of what programs make.
MADE = re.compile(r"(\.venv|build|dist|my-model|/dev|~)\b.*|\.venv.*|jaxinfer-0\.1\.0.*")
SUFFIXES = r"py|pyi|md|json|proto|txt|cfg|toml|ipynb|png|txtpb"
FILE = re.compile(rf"[\w.*<>/-]+\.(?:{SUFFIXES})|\.?[\w<>-]+(?:/[\w.*<>-]+)+/?")
DOTTED = re.compile(r"[a-z_]+(?:\.\w+)+")
NAME = re.compile(r"[A-Z][A-Za-z]+[A-Z]\w*|[A-Z]{2,}(?:_[A-Z]+)+|[a-z]+(?:_[a-z]+)+")
# Names of others, and those that nothing may have.
THEIRS = frozenset({"org/name", "utils.py", "config.json", "argparse.py", "allow_input_fusion"})


@cache
def tracked_files() -> frozenset[str]:
    """Returns the paths of all files that a clone has, and of their folders."""
    files = {
        path.relative_to(ROOT)
        for path in ROOT.rglob("*")
        if path.is_file() and not is_left_out(path.relative_to(ROOT))
    }
    folders = {folder for path in files for folder in path.parents}
    return frozenset(str(path) for path in files | folders)


def is_left_out(path: Path) -> bool:
    """Tells whether tools made it."""
    hidden = {".venv", ".venv-uv", ".venv-aot", ".git", ".pytest_cache", ".ruff_cache"}
    return bool({"__pycache__", "build", "dist", *hidden} & set(path.parts))


@cache
def words() -> frozenset[str]:
    """Returns every name that our sources, their build files and the protocol have."""
    paths = [path for name in SOURCES for path in (ROOT / name).rglob("*.py")]
    paths.remove(Path(__file__))
    paths += [ROOT / "Makefile", ROOT / "setup.cfg", ROOT / "pyproject.toml"]
    paths += (ROOT / "serving/proto").rglob("*.proto")
    found: set[str] = set()
    for path in paths:
        found.update(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return frozenset(found)


def inline(page: Page) -> list[str]:
    """Returns what stands in backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose_of(page.text))


def is_there(path: str) -> bool:
    """Tells whether a path exists, where ``<name>`` and * are anything.

    From the root, or in any folder where it does not begin with one of the root's.
    """
    path = path.strip("/")
    pattern = re.sub(r"\\\*|<[\w-]+>", r"[^/]+", re.escape(path).replace("\\-", "-"))
    is_whole = "/" in path and path.split("/")[0] in tracked_files()
    pattern = pattern if is_whole else rf"(?:.*/)?{pattern}"
    return any(re.fullmatch(pattern, known) for known in tracked_files())


def missing_paths(page: Page) -> set[str]:
    """Returns the paths in backticks that are no file or folder of ours."""
    found = {text for text in inline(page) if FILE.fullmatch(text)}
    return {
        path
        for path in found
        if not MADE.fullmatch(path) and path not in THEIRS and not is_there(path)
    }


def missing_modules(page: Page) -> set[str]:
    """Returns what is written as a module or as its attribute, and is neither."""
    dotted = {text for text in inline(page) if DOTTED.fullmatch(text) and not FILE.fullmatch(text)}
    return {text for text in dotted - THEIRS if not is_module(text)}


def is_module(text: str) -> bool:
    """Tells whether it is a module of ours, by its whole name or the end, or a name within one."""
    parts = text.split(".")
    for count in range(len(parts), 0, -1):
        path = "/".join(parts[:count])
        if is_there(f"{path}.py") or is_there(f"{path}/__init__.py"):
            return set(parts[count:]) <= words()
    return set(parts) <= words()


def missing_names(page: Page) -> set[str]:
    """Returns classes, constants and functions in backticks that no source of ours has."""
    return {text for text in inline(page) if NAME.fullmatch(text)} - words() - THEIRS


def headings(page: Page) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose_of(page.text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Page) -> set[str]:
    """Returns links to files that are not there, or to headings that they do not have."""
    broken = set()
    for target in re.findall(r"\]\(([^)]+)\)", prose_of(page.text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page.name).parent / name if name else ROOT / page.name
        if not path.exists() or (anchor and anchor not in headings(read_page(path.resolve()))):
            broken.add(target)
    return broken


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_page_has_few_lines(name: str) -> None:
    assert len(read_page(ROOT / name).text.splitlines()) <= MOST_LINES[name]


@pytest.mark.parametrize("name", MOST_WORDS)
def test_a_page_has_few_words(name: str) -> None:
    assert len(read_page(ROOT / name).text.split()) <= MOST_WORDS[name]


@each_page
def test_paths_exist(page: Page) -> None:
    assert missing_paths(page) == set()


@each_page
def test_modules_exist(page: Page) -> None:
    assert missing_modules(page) == set()


@each_page
def test_names_exist(page: Page) -> None:
    assert missing_names(page) == set()


@each_page
def test_links_lead_somewhere(page: Page) -> None:
    assert broken_links(page) == set()


@each_page
def test_flags_exist(page: Page) -> None:
    paths = [*(ROOT / "jaxinfer_entrypoints").rglob("*.py"), *(ROOT / "tests/aot").rglob("*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in paths)
    flags = {flag for text in inline(page) for flag in re.findall(r"(?<!\S)(--[a-z][a-z-]+)", text)}
    ours = {flag for flag in flags if f'"{flag}"' in sources}
    assert flags - ours - {"--help", "--wheel"} == set()


@each_page
def test_targets_exist(page: Page) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {match[1] for text in inline(page) if (match := re.match(r"make ([a-z-]+)", text))}
    known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert targets <= known


@each_page
def test_one_word_for_one_thing(page: Page) -> None:
    assert re.findall(r"\bguess\w*", page.text, re.IGNORECASE) == []


def test_every_page_is_on_the_map() -> None:
    linked = set(
        re.findall(r"\]\(([^)#]+)", read_page(ROOT / "README.md").text.split("## Pages")[1])
    )
    listed = {name for name in LISTED if name not in ("README.md", "pallas_kernels/README.md")}
    assert listed == linked


def test_faults_are_found() -> None:
    page = Page(
        "docs/x.md",
        "`jaxinfer/step.py` `jaxinfer/steps.py` `models/<family>.py` `sampler.py` `jaxinfer.step` "
        "`jaxinfer/tiny.py` `step.one_step` `step.two_steps` `EngineSpec` `EngineSpecs` "
        "[a](../README.md#start) [b](../README.md#end) [c](nothing.md) "
        "`tests/data/` `pallas_kernels/<op>/<backend>.py`",
    )
    assert missing_paths(page) == {"jaxinfer/steps.py", "jaxinfer/tiny.py", "sampler.py"}
    assert missing_modules(page) == {"step.two_steps"}
    assert missing_names(page) == {"EngineSpecs"}
    assert broken_links(page) == {"../README.md#end", "nothing.md"}
