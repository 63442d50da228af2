"""Commands that a user is told to type, in a checkout and away from one."""

import tomllib
from pathlib import Path

import jax
import pytest

from jaxinfer.sharding import Device
from jaxinfer_entrypoints.benchmarks.serve import plots as serve_plots
from jaxinfer_entrypoints.loading import devices as platforms
from jaxinfer_entrypoints.loading.options import LoadOptions
from jaxinfer_entrypoints.machine.installing import ROOT, install_command

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize(
    ("extra", "checkout", "wheel"),
    [
        ("", "make setup", "pip install jaxinfer"),
        ("plot", "make setup", 'pip install "jaxinfer[plot]"'),
        ("gpu", "make setup EXTRAS=gpu", 'pip install "jaxinfer[gpu]"'),
        ("tpu", "make setup EXTRAS=tpu", 'pip install "jaxinfer[tpu]"'),
        ("aot", "make aot", 'pip install "jaxinfer[aot]"'),
    ],
)
def test_commands(extra: str, checkout: str, wheel: str, tmp_path: Path) -> None:
    assert install_command(extra) == checkout
    assert install_command(extra, root=tmp_path) == wheel
    assert extra in ("", *EXTRAS)


@pytest.mark.parametrize(("device", "extra"), [("gpu", "gpu"), ("v5e", "tpu")])
def test_a_missing_device_names_the_command_that_can_be_typed(
    device: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices(platform: str | None = None) -> list[Device]:
        if platform is not None:
            raise RuntimeError(f"no {platform}")
        return cpus

    cpus = jax.devices("cpu")[:1]
    monkeypatch.setattr(platforms.jax, "devices", devices)
    options = LoadOptions(device=device)
    for command in (f"make setup EXTRAS={extra}", f'pip install "jaxinfer[{extra}]"'):
        monkeypatch.setattr(platforms, "install_command", {extra: command}.__getitem__)
        with pytest.raises(ValueError) as raised:
            platforms.pick_devices(options)
        assert f" and {command}; without one use --cpu" in str(raised.value)


def test_missing_matplotlib_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_plots.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"^--plot needs matplotlib: make setup$"):
        serve_plots.check_plot(tmp_path / "a.png")
