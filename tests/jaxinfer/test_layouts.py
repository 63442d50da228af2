"""Weights that lie in another order than declared, as on TPU: made, loaded and run on CPU here."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer import sharding
from jaxinfer.engine import Engine
from jaxinfer.sharding import make_mesh, place
from tests.conftest import ManyDevices
from tests.jaxinfer.tiny import (
    make_engine,
    random_parameters,
    random_request,
    run_all,
    tiny_model,
    tiny_spec,
)


def order(leaf: Any) -> tuple[int, ...]:
    """Dimensions from the outermost to the innermost."""
    layout = leaf.format.layout
    return layout.major_to_minor if layout else tuple(range(leaf.ndim))


def test_a_weight_lies_as_matrices_of_embed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "TILED_PLATFORMS", ("cpu",))
    engine = Engine(tiny_spec())
    layer = engine.abstract_parameters["layers"][0]
    layer = {**layer, **layer["attention"], **layer["mlp"]}
    assert order(layer["qkv"]) == (1, 2, 0, 3)
    assert order(layer["gate_up"]) == (1, 0, 2)
    for name in ("o_proj", "down_proj", "input_norm"):
        assert order(layer[name]) == tuple(range(layer[name].ndim)), name


@pytest.mark.thorough("layouts of weights")
def test_tokens_do_not_depend_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [random_request(f"r{i}", 5 + 9 * i, 10, seed=i) for i in range(3)]
    expected = run_all(make_engine(), requests)
    monkeypatch.setattr(sharding, "TILED_PLATFORMS", ("cpu",))
    engine = Engine(tiny_spec())
    engine.compile(shapes=engine.shapes[-1:])  # one is enough, and takes less time
    placed = jax.tree.map(place, random_parameters(tiny_model()), engine.abstract_parameters)
    assert order(placed["layers"][0]["attention"]["qkv"]) == (1, 2, 0, 3)
    engine.start(placed)
    assert run_all(engine, requests) == expected


def copied_to_another_device() -> tuple[tuple[int, ...], set[int], bool]:
    """The order, the devices and whether the values are the same."""
    first, second = (make_mesh([device]) for device in jax.devices()[:2])
    axes = ("embed", None, "ffn")
    values = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    sharding.TILED_PLATFORMS = ("cpu",)
    try:
        formats = [sharding.device_format(mesh, axes) for mesh in (first, second)]
    finally:
        sharding.TILED_PLATFORMS = ("tpu",)
    here, there = (
        jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=format_)  # type: ignore[arg-type]
        for format_ in formats
    )
    copy = place(place(values, here), there)
    return order(copy), {device.id for device in copy.devices()}, bool((copy == values).all())


def test_a_replica_gets_the_same_order(many_devices: ManyDevices) -> None:
    assert many_devices(copied_to_another_device) == ((1, 0, 2), {1}, True)
