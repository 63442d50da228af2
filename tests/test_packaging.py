"""The wheel holds every module and data file, and works away from the checkout."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("checkpoints", "jaxinfer", "jaxinfer_entrypoints", "pallas_kernels", "serving")
DATA_SUFFIXES = {".py", ".pyi", ".json", ".proto", ".typed"}


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    # setuptools itself and no build isolation: this works offline.
    build = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(target)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = target.glob("jaxinfer-*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_holds_every_module_and_data_file(unpacked_wheel: Path) -> None:
    wanted = {
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in DATA_SUFFIXES and "__pycache__" not in path.parts
    }
    missing = {path for path in wanted if not (unpacked_wheel / path).is_file()}
    assert not missing, "a folder without __init__.py, or a suffix not in setup.cfg"


def test_wheel_imports_without_the_checkout(unpacked_wheel: Path) -> None:
    code = "import checkpoints, jaxinfer.scheduler, pallas_kernels, serving.proto as p\n"
    code += "import jaxinfer_entrypoints.serve"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; print(p.__file__)"],
        cwd=unpacked_wheel,
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(result.stdout.strip()).is_relative_to(unpacked_wheel)
