"""A speculative step as the compilers make it: two models, drafts and verification in one program.

Two layers of Llama 3 8B and two of a model of a quarter of its width, with the step that has
everything: decodes that draft and verify, tiles of prompts for both models.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from checkpoints.configs import model_config
from jaxinfer import models
from jaxinfer import step as step_program
from jaxinfer.batch import BatchShape, batch_shapes
from jaxinfer.config import DraftModel, DtypePolicy, EngineConfig
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.sharding import abstract_parameters, make_mesh
from jaxinfer.speculation.drafter import TargetAndDraft
from jaxinfer.step_state import abstract_state
from jaxinfer_entrypoints.machine.tpu_targets import parse_target
from jaxinfer_entrypoints.machine.tpu_topology import topology_devices

LAYERS = 2
MODEL = dataclasses.replace(model_config("llama-3-8b"), num_hidden_layers=LAYERS)
SMALL = dataclasses.replace(
    MODEL, hidden_size=1024, intermediate_size=3584, num_attention_heads=16, head_dim=64
)
DTYPES = DtypePolicy.for_platform("tpu")
CONFIG = EngineConfig(
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=4096,
    page_size=128,
    num_pages=64,
    max_steps_per_call=4,
    draft="model",
    num_drafts=4,
)
TARGETS = ["v5e-1", "v5e-8", "v6e-8", "sm_90a"]


def devices(target: str) -> list[Any]:
    if target != "sm_90a":
        return topology_devices(parse_target(target))
    spec = (Path(__file__).parent / "h100.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=spec)
    return list(topology.devices)


@functools.cache
def compiled(target: str, num_tiles: int) -> Any:
    """The step of eight decodes with drafts, and so many tiles."""
    mesh = make_mesh(devices(target)[:8])
    shape = BatchShape(8, num_tiles, CONFIG.num_drafts)
    assert shape in batch_shapes(CONFIG)
    draft = DraftModel(SMALL, DTYPES)
    graphs, parameters = [], []
    for model in (MODEL, SMALL):
        graph, state = models.abstract(model, DTYPES, mesh)
        graphs.append(graph)
        parameters.append(abstract_parameters(state, mesh))
    state = abstract_state(EngineSpec(MODEL, CONFIG, DTYPES, mesh, draft))
    with jax.set_mesh(mesh):
        lowered = step_program.lower(
            TargetAndDraft(*graphs), CONFIG, shape, TargetAndDraft(*parameters), state, mesh
        )
        return lowered.compile(), state


# Without tiles several whole steps are a loop on the device.
PROGRAMS = [*((target, 1) for target in TARGETS), ("v5e-8", 0), ("sm_90a", 0)]


@pytest.mark.parametrize(("target", "num_tiles"), PROGRAMS)
def test_a_speculative_step_is_one_program(target: str, num_tiles: int) -> None:
    program, _ = compiled(target, num_tiles)
    text = program.as_text()
    assert text.count("HloModule") == 1
    for name in ("infeed", "outfeed", "callback", " send(", " recv("):
        assert name not in text
    if target != "sm_90a":
        # Both models run the kernel: the target once, the draft to catch up, to begin, to go on.
        assert text.count('custom_call_target="tpu_custom_call"') >= 4 * LAYERS


@pytest.mark.parametrize("target", TARGETS)
def test_pages_of_both_models_are_updated_in_place(target: str) -> None:
    program, state = compiled(target, 1)
    pages = sum(
        leaf.dtype.itemsize * leaf.size // len(leaf.sharding.device_set)
        for leaf in jax.tree.leaves((state.kv_pages, state.draft_kv_pages))
    )
    assert program.memory_analysis().alias_size_in_bytes >= pages
