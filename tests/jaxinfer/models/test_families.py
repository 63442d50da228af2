"""Every family against transformers, on small random models.

The numbers were made by tests/data/make_family_reference.py; see there.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from checkpoints.load import load_parameters
from jaxinfer import models
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.models import ARCHITECTURES, GGUF_ARCHITECTURES
from jaxinfer.request import Request
from jaxinfer.sharding import abstract_parameters, make_mesh
from tests.conftest import ManyDevices
from tests.data.random_family import NUM_PROMPT_TOKENS, draw_prompt
from tests.jaxinfer.logits import prompt_logits
from tests.jaxinfer.models.random_checkpoint import CASES, RandomCheckpoint
from tests.jaxinfer.tiny import CPU_DTYPES, run_all, tiny_config
from tests.thorough import thorough_beyond

# What each family is shown with over devices; its other cases differ in what is not divided.
ONE_OF_EACH = ["qwen2", "mistral_window_20", "qwen3", "gemma3", "phi3", "mixtral", "qwen3_moe"]
# Of all that families compute most: windows, norms, experts, fused and partly rotated.
QUICK = ["gemma3", "phi3", "qwen3_moe"]
SUBJECT = "more cases of the families"


@functools.cache
def parameters_of(case: str) -> dict[Any, Any]:
    checkpoint = RandomCheckpoint(case)
    _, state = models.abstract(checkpoint.model, CPU_DTYPES)
    abstract = abstract_parameters(state, make_mesh(jax.devices("cpu")[:1]))
    return load_parameters(checkpoint, abstract)


def greedy_tokens(
    case: str, num_devices: int = 1, chunk: int = 16, num_neighbours: int = 0
) -> list[int]:
    """Returns an engine's continuation of the prompt, in chunks of ``chunk`` tokens.

    Beside it run ``num_neighbours`` other prompts, of other lengths.
    """
    checkpoint = RandomCheckpoint(case)
    mesh = make_mesh(jax.devices()[:num_devices])
    config = tiny_config(max_num_batched_tokens=chunk)
    engine = Engine(EngineSpec(checkpoint.model, config, CPU_DTYPES, mesh))
    engine.compile(shapes=engine.shapes[-1:])  # one is enough, and takes less time
    engine.start(load_parameters(checkpoint, engine.abstract_parameters, num_devices=num_devices))
    prompt = tuple(draw_prompt(case))
    others = [
        Request(f"{i}", prompt[3 * i + 5 :: i + 1], 40 - 7 * i, ignore_eos=True)
        for i in range(num_neighbours)
    ]
    request = Request("a", prompt, len(CASES[case]["greedy_ids"]), ignore_eos=True)
    return run_all(engine, [*others, request])["a"]


def test_every_family_has_a_case() -> None:
    files = {ARCHITECTURES[case["config"]["model_type"]] for case in CASES.values()}
    assert files | {"llama"} == set(ARCHITECTURES.values())
    assert files == {ARCHITECTURES[CASES[case]["config"]["model_type"]] for case in ONE_OF_EACH}
    assert set(GGUF_ARCHITECTURES.values()) <= set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_a_family_names_every_tensor_of_its_file(case: str) -> None:
    places = RandomCheckpoint(case).places.values()
    named = {name: place.shape for place in places for name in place.names}
    assert named == {name: tuple(shape) for name, shape in CASES[case]["tensors"].items()}


@pytest.mark.parametrize("case", thorough_beyond(QUICK, CASES, SUBJECT))
def test_logits_equal_transformers(case: str) -> None:
    model = RandomCheckpoint(case).model
    logits = prompt_logits(model, parameters_of(case), draw_prompt(case), tiny_config())
    for position, wanted in CASES[case]["logits"].items():
        largest = np.abs(wanted).max()
        assert np.abs(logits[int(position)] - wanted).max() <= 1e-4 * largest, position


@pytest.mark.parametrize("case", thorough_beyond(["gemma3"], CASES, SUBJECT))
def test_a_prompt_in_chunks_equals_the_whole(case: str) -> None:
    """Bit for bit: tiles are of 16 rows in both."""
    model, prompt = RandomCheckpoint(case).model, draw_prompt(case)
    parameters = parameters_of(case)
    chunks = prompt_logits(model, parameters, prompt, tiny_config())
    whole = prompt_logits(model, parameters, prompt, tiny_config(), num_tiles=4)
    assert len(prompt) == NUM_PROMPT_TOKENS <= 4 * 16
    np.testing.assert_array_equal(chunks, whole)


@pytest.mark.parametrize("case", thorough_beyond(["mixtral"], CASES, SUBJECT))
def test_greedy_tokens_equal_transformers(case: str) -> None:
    assert min(CASES[case]["greedy_gaps"]) > 1e-3, "drawn so that no step is a near tie"
    assert greedy_tokens(case) == CASES[case]["greedy_ids"]


@pytest.mark.parametrize("case", thorough_beyond([], ONE_OF_EACH, SUBJECT))
def test_eight_devices_give_the_same_tokens(many_devices: ManyDevices, case: str) -> None:
    assert many_devices(greedy_tokens, case, 8) == CASES[case]["greedy_ids"]


@pytest.mark.parametrize(
    "case", thorough_beyond(["mixtral"], ["gemma3", "mixtral", "qwen3_moe"], SUBJECT)
)
def test_neighbours_change_nothing(case: str) -> None:
    assert greedy_tokens(case, num_neighbours=3) == CASES[case]["greedy_ids"]
