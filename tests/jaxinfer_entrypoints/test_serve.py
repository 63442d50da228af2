"""scripts/serve.py's own flags; tests/test_end_to_end.py runs the server."""

import sys
from typing import Any

import pytest

from serving.loop import EngineStuckError
from tests.jaxinfer_entrypoints.conftest import Run


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "65536"],
        ["--port", "-1"],
        ["--grace-seconds", "nan"],
        ["--grace-seconds", "-1"],
        ["--step-timeout", "nan"],
        ["--step-timeout", "-1"],
    ],
)
def test_wrong_usage(run: Run, flags: list[str]) -> None:
    result = run("serve", *flags)
    assert result.error == "2"
    assert f"{flags[0]} must be between 0 and" in result.stderr


def test_an_empty_model_name(run: Run) -> None:
    error = run("generate", "a", "--model", "").error
    assert "model '' is neither a file or folder nor a known name" in error


def test_a_stuck_engine_ends_the_process_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts = []

    def run_server(load: Any, options: Any, **_: Any) -> None:
        timeouts.append(options.step_timeout)
        raise EngineStuckError("the engine has not ended a step in 7 s")

    monkeypatch.setattr("jaxinfer_entrypoints.serve.run_server", run_server)
    monkeypatch.setattr("os._exit", lambda code: sys.exit(f"at once: {code}"))
    result = run("serve", "--step-timeout", "7")
    assert result.error == "at once: 1"
    assert result.stderr == "error: the engine has not ended a step in 7 s\n"
    run("serve", "--step-timeout", "0")
    assert timeouts == [7.0, None]
