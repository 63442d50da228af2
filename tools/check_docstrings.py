"""A check that no docstring begins with a question word: "Returns the pages", not "What it has".

A sentence that begins so names its subject late or never. Knows Python's syntax and nothing of the
packages.
"""

import argparse
import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("jaxinfer", "jaxinfer_entrypoints", "pallas_kernels", "serving", "checkpoints"),
    *("scripts", "tools", "tests"),
)
FORBIDDEN = re.compile(r"\s*(what|which|whether|of|where|when|how|who|why)\b", re.IGNORECASE)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def forbidden_docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields line number and first line of each docstring in ``source`` that must not begin so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED):
            text = ast.get_docstring(node)
            if text is not None and FORBIDDEN.match(text):
                yield node.body[0].lineno, text.splitlines()[0]


def python_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields the files to be checked, in order; those that a generator made are left out."""
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else (path,):
            if not file.stem.endswith(("_pb2", "_pb2_grpc")):
                yield file


def main() -> None:
    """Prints one line for each docstring that must not begin so; exit code 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="default: all packages and tests")
    paths = parser.parse_args().paths or [ROOT / name for name in PACKAGES]
    is_clean = True
    for file in python_files(paths):
        for line, text in sorted(forbidden_docstrings(file.read_text(encoding="utf-8"))):
            shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
            print(f"{shown}:{line}: {text}")
            is_clean = False
    if not is_clean:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
