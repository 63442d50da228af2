"""scripts/serve.py's own flags; tests/test_end_to_end.py runs the server."""

import pytest

from tests.jaxinfer_entrypoints.conftest import Run


@pytest.mark.parametrize(
    "flags",
    [["--port", "65536"], ["--port", "-1"], ["--grace-seconds", "nan"], ["--grace-seconds", "-1"]],
)
def test_wrong_usage(run: Run, flags: list[str]) -> None:
    result = run("serve", *flags)
    assert result.error == "2"
    assert f"{flags[0]} must be between 0 and" in result.stderr


def test_an_empty_model_name(run: Run) -> None:
    error = run("generate", "a", "--model", "").error
    assert "model '' is neither a file or folder nor a known name" in error
