"""Commands that install what is missing. Imports nothing that may be missing itself."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AOT_PYTHON = ".venv-aot/bin/python"


def install_command(extra: str = "", root: Path = ROOT) -> str:
    """The command that brings jaxinfer's packages, and those of an ``extra`` (gpu, tpu, aot, plot).

    With make in a checkout, with pip where a wheel was installed: there is no Makefile then.
    """
    if not (root / "Makefile").is_file():
        return f'pip install "jaxinfer[{extra}]"' if extra else "pip install jaxinfer"
    if extra == "aot":  # an environment of its own, .venv-aot
        return "make aot"
    # What draws plots is among the packages for development, which make setup always brings.
    return f"make setup EXTRAS={extra}" if extra not in ("", "plot") else "make setup"
