"""The whole engine over several devices: scheduling, paging and sampling included."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from jaxinfer import models
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.sharding import make_mesh, physical_model, physical_parameter
from tests.conftest import ManyDevices
from tests.jaxinfer.tiny import CPU_DTYPES, random_request, run_all, tiny_config, tiny_model
from tests.thorough import thorough_beyond

MODEL = tiny_model(num_attention_heads=14, num_key_value_heads=2, intermediate_size=66)


def outputs_over(
    num_devices: int, max_steps_per_call: int, kv_cache: str = "float32"
) -> dict[str, list[int]]:
    """Greedy and seeded requests on an engine with few pages, its kv heads split or repeated."""
    mesh = make_mesh(jax.devices("cpu")[:num_devices])
    config = tiny_config(num_pages=24, max_steps_per_call=max_steps_per_call)
    engine = Engine(EngineSpec(MODEL, config, replace(CPU_DTYPES, kv_cache=kv_cache), mesh))
    engine.compile(shapes=[engine.shapes[0], engine.shapes[-1]])
    logical = nnx.to_pure_dict(nnx.state(models.build(MODEL, CPU_DTYPES, nnx.Rngs(0))))
    logical["lm_head"] = logical["lm_head"] * 3
    physical = physical_model(MODEL, num_devices)

    def place(path: tuple, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        leaf, keys = logical, tuple(entry.key for entry in path)
        for key in keys:
            leaf = leaf[key]
        axes = models.declared_parameters(MODEL)[keys].axes
        array = physical_parameter(axes, np.asarray(leaf), MODEL, physical)
        return jax.device_put(array, wanted.sharding)

    engine.start(jax.tree_util.tree_map_with_path(place, engine.abstract_parameters))
    requests = [
        random_request(
            f"r{i}",
            3 + 13 * i % 70,
            12,
            seed=i,
            temperature=0.7 * (i % 2),
            repetition_penalty=1.0 + 0.2 * (i % 3),
        )
        for i in range(10)
    ]
    outputs = run_all(engine, requests)
    assert engine.stats.num_preemptions > 0
    return outputs


@pytest.mark.parametrize(
    ("num_devices", "max_steps_per_call"),
    thorough_beyond([], [(2, 1), (4, 4)], "engines over more devices"),
)
def test_tokens_equal_those_of_one_device(
    num_devices: int, max_steps_per_call: int, many_devices: ManyDevices
) -> None:
    """Sums are taken in another order: equal where the best logit leads, as it does here."""
    alone = many_devices(outputs_over, 1, 1)
    assert many_devices(outputs_over, num_devices, max_steps_per_call) == alone


@pytest.mark.thorough("engines over more devices")
def test_with_pages_in_8_bits_too(many_devices: ManyDevices) -> None:
    """Preempted sequences come back to the same pages, their heads on any device."""
    alone = many_devices(outputs_over, 1, 1, "int8")
    assert many_devices(outputs_over, 4, 4, "int8") == alone
