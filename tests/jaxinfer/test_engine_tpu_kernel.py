"""The whole engine around the TPU kernel, which is interpreted on the CPU."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.request import Request
from pallas_kernels.ragged_paged_attention.packed_pages import PackedKVPages
from tests.jaxinfer.tiny import make_engine, random_request, run_all, tiny_config, tiny_model

ONE_LAYER = tiny_model(num_hidden_layers=1)
REQUESTS = [(5, 3), (37, 2)]  # prompt length, new tokens
SIZES = {"max_num_batched_tokens": 32, "max_num_seqs": 2, "max_model_len": 256, "page_size": 32}


@pytest.fixture(scope="module")
def tokens_of_plain_xla() -> dict[str, list[int]]:
    """Greedy and seeded tokens of the backend that other tests compare with references."""
    return run_all(make_engine(tiny_config(**SIZES), ONE_LAYER), requests())


def requests() -> list[Request]:
    return [
        random_request(str(number), length, count, seed=number, temperature=number % 2)
        for number, (length, count) in enumerate(REQUESTS)
    ]


@pytest.mark.thorough("the TPU kernel in the engine")
def test_engine_gives_the_tokens_of_plain_xla(tokens_of_plain_xla: dict[str, list[int]]) -> None:
    """Chunks of several tiles, decodes beside them, donated state."""
    pltpu.set_tpu_interpret_mode(pltpu.InterpretParams())
    try:
        engine = make_engine(tiny_config(attention="tpu", **SIZES), ONE_LAYER)
        assert engine._state is not None
        assert isinstance(engine._state.kv_pages[0], PackedKVPages)
        assert run_all(engine, requests()) == tokens_of_plain_xla
    finally:
        pltpu.reset_tpu_interpret_mode_state()
        pltpu.set_tpu_interpret_mode(None)  # type: ignore[arg-type]
