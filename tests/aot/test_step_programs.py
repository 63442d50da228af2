"""The whole step program as the TPU compiler makes it: two layers of full width, every target.

That it compiles says that HBM, VMEM and SMEM suffice: the compiler refuses what does not fit.
"""

import collections
import dataclasses
import functools
import re
from dataclasses import dataclass

import jax
import pytest

from checkpoints.configs import model_config
from jaxinfer.config import DtypePolicy, EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.kv_cache import plan_num_pages
from jaxinfer.sharding import make_mesh
from jaxinfer_entrypoints.loading.sizes import tpu_kv_bytes
from jaxinfer_entrypoints.machine.tpu_targets import parse_target
from jaxinfer_entrypoints.machine.tpu_topology import topology_devices
from jaxinfer_entrypoints.memory.plan import MemoryPlan, plan_memory

LAYERS = 2
DENSE = dataclasses.replace(model_config("llama-3-8b"), num_hidden_layers=LAYERS)
EXPERTS = dataclasses.replace(model_config("qwen3-30b-a3b"), num_hidden_layers=LAYERS)
# A target, and which model is compiled for it where it is not the dense one.
TARGETS = ["v5e-1", "v5e-8", "v6e-1", "v6e-8", "v5p-8", "v5e-8 experts"]
DTYPES = DtypePolicy.for_platform("tpu")
# One number of decode rows: four programs, of which the smallest and the largest are compiled.
# Pages for one sequence, until memory is planned.
SIZES = EngineConfig(
    max_num_seqs=8,
    max_num_batched_tokens=512,
    max_model_len=8192,
    page_size=128,
    num_pages=64,
    max_steps_per_call=4,
)


@dataclass(frozen=True)
class Compiled:
    """All programs of a target, with a KV cache that fills what is left."""

    engine: Engine
    memory: MemoryPlan
    hbm_bytes: int

    @property
    def num_chips(self) -> int:
        return self.engine.spec.mesh.size


@functools.cache
def compiled(name: str) -> Compiled:
    """Compiled once for all tests of a target."""
    target, model = parse_target(name.split()[0]), EXPERTS if "experts" in name else DENSE
    mesh, hbm_bytes = make_mesh(topology_devices(target)), target.generation.hbm_bytes
    spec = EngineSpec(model, SIZES, DTYPES, mesh)
    num_pages = plan_num_pages(spec, tpu_kv_bytes(spec, hbm_bytes) * mesh.size)
    spec = dataclasses.replace(spec, config=dataclasses.replace(SIZES, num_pages=num_pages))
    engine = Engine(spec)
    with jax.set_mesh(mesh):
        engine.compile(shapes=[engine.shapes[0], engine.shapes[-1]])
    return Compiled(engine, plan_memory(spec), hbm_bytes)


def collectives(text: str) -> collections.Counter[tuple[str, int]]:
    """Counts a program's collectives by kind and size, in numbers of the result."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    for result, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text):
        sizes = re.findall(r"\[([\d,]+)\]", result)
        count = 1
        for side in sizes[-1].split(","):
            count *= int(side)
        counts[kind, count] += 1
    return counts


@pytest.mark.parametrize("name", TARGETS)
def test_the_kernel_is_in_it_once_a_layer_at_least(name: str) -> None:
    for shape, program in compiled(name).engine.programs.items():
        calls = program.as_text().count('custom_call_target="tpu_custom_call"')
        assert calls >= LAYERS, shape


@pytest.mark.parametrize("name", TARGETS)
def test_pages_are_updated_in_place(name: str) -> None:
    one = compiled(name)
    for shape, program in one.engine.programs.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= one.memory.kv_pages, shape
        # A copy of one layer's pages would be larger than all temporaries together.
        assert memory.temp_size_in_bytes < one.memory.kv_pages / LAYERS / 2, shape


@pytest.mark.parametrize("name", TARGETS)
def test_weights_lie_as_products_want_them(name: str) -> None:
    """As declared, [E, G, R + 2, D] and [E, 2, F], they would be copied in every call.

    Experts, [X, E, 2 F] and [X, F, E], are not.
    """
    one = compiled(name)
    model = one.engine.spec.model
    size = model.hidden_size
    heads, experts = (
        rf"{size},\d+,\d+(,128)?",
        rf"\d+,({size},\d+|{model.intermediate_size},{size})",
    )
    weights = rf"{heads}|{experts}" if model.num_experts else heads
    for shape, program in one.engine.programs.items():
        for computation in re.split(r"\n(?=\S)", program.as_text()):
            if not computation.startswith("%fused"):  # what is fused is not written to memory
                assert not re.search(rf"= bf16\[({weights})\]\S* copy\(", computation), shape
    decodes = one.engine.programs[one.engine.shapes[0]]
    assert decodes.memory_analysis().temp_size_in_bytes < 128 << 20


@pytest.mark.parametrize("name", TARGETS)
def test_two_sums_a_layer_and_no_gathered_weights_or_pages(name: str) -> None:
    one = compiled(name)
    model = one.engine.spec.model
    for shape, program in one.engine.programs.items():
        found = collectives(program.as_text())
        if one.num_chips == 1:
            assert not found, shape
            continue
        rows = shape.num_decodes + shape.num_tiles * SIZES.chunk_tile
        # Logits of the tiles of prompts that are scored, in a loop that may be unrolled.
        scored = found.pop(("all-gather", SIZES.chunk_tile * model.vocab_size), 0)
        assert (scored > 0) == (shape.num_tiles > 0), shape
        # One more sum for the embedding's rows, and the logits.
        assert found == {
            ("all-reduce", rows * model.hidden_size): 2 * LAYERS + 1,
            ("all-gather", shape.num_logits_rows * model.vocab_size): 1,
        }, shape


@pytest.mark.parametrize("name", TARGETS)
def test_the_plan_agrees_with_the_compiler(name: str) -> None:
    """Within 3 % of all, with a KV cache that fills the chip, and not below it by more than 1 %."""
    one = compiled(name)
    analyses = [program.memory_analysis() for program in one.engine.programs.values()]
    arguments = max(analysis.argument_size_in_bytes for analysis in analyses)
    plan = one.memory
    assert arguments == pytest.approx(plan.weights + plan.kv_pages + plan.slots, rel=1e-3)
    total = arguments + max(analysis.temp_size_in_bytes for analysis in analyses)
    total += sum(analysis.generated_code_size_in_bytes for analysis in analyses)
    assert 0.99 * total <= plan.total <= 1.03 * total
    assert 0.94 * one.hbm_bytes < total <= one.hbm_bytes
