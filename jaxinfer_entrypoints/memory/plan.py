"""Bytes that each chip will hold, by arithmetic: before anything is loaded or compiled."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import models
from jaxinfer.batch import BatchShape, batch_shapes, packed_size
from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.sharding import abstract_parameters, device_bytes, num_tensor_devices, physical_model
from jaxinfer.step_state import abstract_state
from jaxinfer_entrypoints.machine.units import MIB
from pallas_kernels.ragged_paged_attention.packed_pages import PackedKVPages

# Code of a program, from above, as the compiler of libtpu 0.0.48 made it for 2 to 32 layers.
DECODES_CODE = 8 * MIB
TILES_CODE = 16 * MIB
# Times as much with a draft model that catches up, begins and goes on.
DRAFT_CODE = 3
# Equal layers share their code, but not where chips belong to several hosts: of each layer, then.
DECODES_LAYER_CODE = int(0.8 * MIB)
TILES_LAYER_CODE = int(3.7 * MIB)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each chip.

    ``slots``: what a step knows of its sequences besides their pages, and its rows.
    ``temporaries`` of the largest program, ``code`` of all of them. ``page_copies`` is 0 where
    pages are written in place.
    """

    weights: int
    kv_pages: int
    slots: int
    temporaries: int
    code: int
    page_copies: int = 0

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return sum(dataclasses.astuple(self))


def plan_memory(spec: EngineSpec) -> MemoryPlan:
    """Weights, pages and slots to the byte, the rest as estimates.

    On TPU plain XLA attention copies all pages in every call, once as they are and once as its
    products want them; the kernel writes them in place.
    """
    model, config, dtypes, mesh, draft = spec.model, spec.config, spec.dtypes, spec.mesh, spec.draft
    state = abstract_state(spec)
    rest = dataclasses.replace(state, kv_pages=(), draft_kv_pages=())
    shapes = batch_shapes(config)
    kv_pages = device_bytes((state.kv_pages, state.draft_kv_pages))
    in_place = isinstance(state.kv_pages[0], PackedKVPages)
    return MemoryPlan(
        weights=parameter_bytes(model, dtypes, mesh)
        + (parameter_bytes(draft.model, draft.dtypes, mesh) if draft else 0),
        kv_pages=kv_pages,
        slots=device_bytes(rest) + 4 * packed_size(shapes[-1], config),
        temporaries=_temporary_bytes(spec, shapes[-1]),
        code=sum(
            _code_bytes(model, shape, mesh) * (DRAFT_CODE if draft and shape.num_drafts else 1)
            for shape in shapes
        ),
        page_copies=0 if in_place else 2 * kv_pages,
    )


def smallest_plan(spec: EngineSpec) -> MemoryPlan:
    """The plan with pages for one sequence of ``max_model_len``: what fits holds at least this."""
    smallest = dataclasses.replace(spec.config, num_pages=spec.config.max_pages_per_sequence)
    return plan_memory(dataclasses.replace(spec, config=smallest))


def parameter_bytes(model: ModelConfig, dtypes: DtypePolicy, mesh: Mesh) -> int:
    """Bytes of a model's parameters on each device, from its declarations."""
    _, state = models.abstract(model, dtypes, mesh)
    return device_bytes(abstract_parameters(state, mesh))


def _temporary_bytes(spec: EngineSpec, shape: BatchShape) -> int:
    """Estimates the largest step's: what lies between two products of the MLP, logits three times.

    A head that is the embedding too, or is divided, lies otherwise than one of its uses wants it.
    """
    model, devices = spec.model, num_tensor_devices(spec.mesh)
    physical = physical_model(model, devices)
    rows = shape.num_decodes + shape.num_tiles * spec.config.chunk_tile
    hidden = rows * (2 * physical.intermediate_size // devices + physical.hidden_size) * 4
    logits = (shape.num_logits_rows + spec.config.chunk_tile) * physical.vocab_size * 4
    head = (
        physical.hidden_size
        * physical.vocab_size
        // devices
        * jnp.dtype(spec.dtypes.weights).itemsize
    )
    return hidden + 3 * logits + (head if model.tie_word_embeddings or devices > 1 else 0)


def _code_bytes(model: ModelConfig, shape: BatchShape, mesh: Mesh) -> int:
    """Estimates a program's code: tiles of prompts bring more of everything."""
    once, layer = DECODES_CODE, DECODES_LAYER_CODE
    if shape.num_tiles:
        once, layer = TILES_CODE, TILES_LAYER_CODE
    hosts = {device.process_index for device in mesh.devices.flat}
    return once + (layer * model.num_hidden_layers if len(hosts) > 1 else 0)
