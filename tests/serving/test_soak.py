"""The trials of ``make soak`` with small numbers and a fake engine: nobody is lost."""

import os

import pytest

from tests.serving.fakes import FakeEngine
from tests.serving.running import run, running_server
from tools.soak import SHORT, TRIALS, Server, soak


def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with running_server(FakeEngine(), max_live_requests=16) as (target, _):
            await soak(Server(target, os.getpid()), SHORT)

    run(test())
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == TRIALS.keys()
    for name in ("empty messages", "long prompts"):
        assert f"codes {{'INVALID_ARGUMENT': {SHORT.num_large}}}" in lines[name]
    assert "CANCELLED" not in lines["overload"]
    assert "afterwards OK" in lines["overload"]
    assert "codes {'RESOURCE_EXHAUSTED':" in lines["headers only"]
