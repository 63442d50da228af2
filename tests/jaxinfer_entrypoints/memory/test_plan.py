"""The plan of a chip's memory, and the estimate of speed, by hand where a hand can follow."""

import dataclasses

import jax
import pytest

from checkpoints.configs import model_config
from jaxinfer.config import DtypePolicy, EngineConfig
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.sharding import make_mesh
from jaxinfer_entrypoints.fit.roofline import Roofline
from jaxinfer_entrypoints.machine.tpu_targets import GENERATIONS
from jaxinfer_entrypoints.memory.plan import parameter_bytes, plan_memory

MODEL = model_config("llama-3-8b")
CONFIG = EngineConfig(max_num_seqs=16, max_model_len=8192, page_size=128, num_pages=100)
DTYPES = DtypePolicy.for_platform("tpu")
PARAMETERS = 8_030_261_248
NORMS = 65 * 4096  # float32 everywhere


def test_weights_and_pages_to_the_byte() -> None:
    mesh = make_mesh(jax.devices()[:1])
    plan = plan_memory(EngineSpec(MODEL, CONFIG, DTYPES, mesh))
    assert plan.weights == 2 * PARAMETERS + 2 * NORMS == parameter_bytes(MODEL, DTYPES, mesh)
    assert plan.kv_pages == 100 * 128 * 32 * 2 * 8 * 128 * 2
    assert plan.page_copies == 2 * plan.kv_pages  # plain XLA attention here
    assert plan.total == sum(dataclasses.astuple(plan))
    more = plan_memory(EngineSpec(MODEL, dataclasses.replace(CONFIG, num_pages=200), DTYPES, mesh))
    assert more.kv_pages == 2 * plan.kv_pages
    assert more.total - plan.total == 3 * plan.kv_pages


def test_int8_halves_matrices_only() -> None:
    dtypes = dataclasses.replace(DTYPES, quantization="int8")
    plan = plan_memory(EngineSpec(MODEL, CONFIG, dtypes, make_mesh(jax.devices()[:1])))
    # A scale for each output: of q, k, v, o, gate, up and down, of the embedding and the head.
    outputs = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096) + 2 * 128256
    assert plan.weights == PARAMETERS - NORMS + 4 * NORMS + 4 * outputs


def test_a_roofline_by_hand() -> None:
    """One sequence is bound by reading the weights, 1,024 rows by multiplying with them."""
    v5e = GENERATIONS["v5e"]
    roofline = Roofline(EngineSpec(MODEL, CONFIG, DTYPES, make_mesh(jax.devices()[:1])), v5e)
    read = 2 * PARAMETERS + 2 * NORMS - 2 * 128256 * 4096  # no embedding table
    token = 32 * 2 * 8 * 128 * 2
    seconds = roofline.decode_seconds(1, 1000)
    assert seconds == pytest.approx((read + 1000 * token) / 819e9)
    # Many sequences share the reading of the weights.
    assert roofline.decode_seconds(8, 1000) < 1.5 * seconds
    flops = 2 * (read / 2) * 1024 + 1024 * 4 * 512 * 32 * 128 * 32
    assert roofline.prefill_seconds(1024) == pytest.approx(flops / 197e12, rel=0.01)


def test_a_roofline_of_experts() -> None:
    """A step reads the experts that its rows want, and a row computes with its own."""
    v5e, layers = GENERATIONS["v5e"], 4
    model = dataclasses.replace(model_config("qwen3-30b-a3b"), num_hidden_layers=layers)
    roofline = Roofline(EngineSpec(model, CONFIG, DTYPES, make_mesh(jax.devices()[:1])), v5e)
    experts = layers * 128 * 3 * 2048 * 768
    attention = layers * 2048 * 128 * (2 * 32 + 2 * 4)
    rest = attention + 2048 * 151936
    token = layers * 2 * 4 * 128 * 2
    read = 2 * (rest + experts * 8 / 128)
    assert roofline.decode_seconds(1, 1000) == pytest.approx(
        (read + 1000 * token) / 819e9, rel=0.01
    )
    read = 2 * (rest + experts * (1 - (120 / 128) ** 16))
    assert roofline.decode_seconds(16, 0) == pytest.approx(read / 819e9, rel=0.01)
    flops = 1024 * (2 * (rest + experts * 8 / 128) + 4 * 512 * 32 * 128 * layers)
    read = 2 * 2 * (rest + experts)
    assert roofline.prefill_seconds(1024) == pytest.approx(
        max(flops / 197e12, read / 819e9), rel=0.02
    )
