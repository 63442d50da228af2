"""Bounds on the shape of the code that no other tool checks."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Kernels are left out: their operands are what they are.
PACKAGES = ("checkpoints", "jaxinfer", "jaxinfer_entrypoints", "serving")
MAX_PARAMETERS = 6


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                        yield f"{path.relative_to(ROOT)}: {node.name}", node


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts all but the object or class of a method, and what ``*`` and ``**`` collect."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_no_function_has_more_than_six_parameters() -> None:
    counted = {name: num_parameters(function) for name, function in functions()}
    assert len(counted) > 500
    assert {name: n for name, n in counted.items() if n > MAX_PARAMETERS} == {}


def names_load_model(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
            return name == "load_model"
    return False


def test_models_are_loaded_through_the_front_door() -> None:
    """All but the server, whose replicas share a model, load one as ``LLM``."""
    callers = {
        path.relative_to(ROOT).as_posix()
        for folder in (*PACKAGES, "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if any(map(names_load_model, ast.walk(ast.parse(path.read_text()))))
    }
    assert callers == {"jaxinfer_entrypoints/llm.py", "jaxinfer_entrypoints/serve.py"}


def test_scripts_are_launchers() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("scripts/*.py")}
    assert len(lines) <= 9
    assert max(lines.values()) <= 10


def test_who_drafts_is_asked_by_no_other_word() -> None:
    """One word for one thing."""
    word = "gu" + "ess"
    for package in (*PACKAGES, "pallas_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert word not in path.read_text().lower(), path


def is_drafters_name(node: ast.expr) -> bool:
    """Tells if ``node`` is ``draft`` of an engine's config."""
    match node:
        case ast.Attribute(attr="draft", value=ast.Attribute(attr="config" | "_config")):
            return True
        case ast.Attribute(attr="draft", value=ast.Name(id="config")):
            return True
    return False


def test_no_drafter_is_asked_for_by_name() -> None:
    """All but the lookup in the table ask a drafter's traits."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Compare):
                    sides = (node.left, *node.comparators)
                    assert not any(map(is_drafters_name, sides)), f"{path}:{node.lineno}"
