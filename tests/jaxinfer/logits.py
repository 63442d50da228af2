"""Logits of whole prompts through the paged step, for tests that compare numbers."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer import models, step
from jaxinfer.batch import BatchShape, Packer, unpack
from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.request import Request
from jaxinfer.schedule import Schedule, ScheduledSequence
from jaxinfer.sharding import make_mesh
from jaxinfer.step_state import StepState, abstract_state
from tests.jaxinfer.tiny import CPU_DTYPES


def prompt_logits(
    model: ModelConfig,
    parameters: dict[Any, Any],
    token_ids: Sequence[int],
    config: EngineConfig,
    num_tiles: int = 2,
    dtypes: DtypePolicy = CPU_DTYPES,
) -> np.ndarray:
    """[n, V] float32 after every token of a prompt, computed in chunks of ``num_tiles`` tiles."""
    mesh = make_mesh(jax.devices("cpu")[:1])
    abstract = abstract_state(EngineSpec(model, config, dtypes, mesh))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    shape, size = BatchShape(8, num_tiles), num_tiles * config.chunk_tile

    program = _program(model, config, shape, dtypes)
    logits = []
    for start in range(0, len(token_ids), size):
        tokens = tuple(token_ids[start : start + size])
        chunk = ScheduledSequence(
            request=Request("a", tokens, max_tokens=1),
            choice=0,
            slot=0,
            admission=0,
            start=start,
            num_tokens=len(tokens),
            page_ids=tuple(range(config.max_pages_per_sequence)),
            samples=False,
            token_ids=tokens,
        )
        packed, _ = Packer(config).pack(Schedule(chunks=(chunk,)), shape)
        state, rows = program(parameters, state, packed)
        logits.append(np.asarray(rows)[: len(tokens)])
    return np.concatenate(logits)


@functools.cache
def _program(
    model: ModelConfig, config: EngineConfig, shape: BatchShape, dtypes: DtypePolicy
) -> Any:
    """Compiled once for all prompts of a model."""
    graph, _ = models.abstract(model.served(config.max_model_len), dtypes)

    def program(parameters: Any, state: StepState, packed: jax.Array) -> Any:
        llama = nnx.merge(graph, parameters)
        batch = unpack(packed, shape, config)
        hidden, _, state = step.forward(llama, state, batch, config)
        return state, llama.logits(hidden[shape.num_decodes :])

    options = step.compiler_options("cpu", dtypes)
    return jax.jit(program, donate_argnums=1, compiler_options=options)
