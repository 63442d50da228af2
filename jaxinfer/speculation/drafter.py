"""The protocol of drafters, and the part of a step in which they draft. Knows none of them by name.

Axis letters: D decodes, K drafts, V vocab.
"""

import importlib
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from jaxinfer.batch import Batch, BatchShape
from jaxinfer.config import EngineConfig
from jaxinfer.speculation.drafts import Drafts, Wanted
from jaxinfer.step_state import StepState


class TargetAndDraft(NamedTuple):
    """Something of both models of a step; ``draft`` is None without a draft model."""

    target: Any
    draft: Any = None


class Drafter(Protocol):
    """Drafts tokens inside the program of a step; its needs are its ``DrafterTraits``.

    Each drafter is a file with a class ``Drafter`` of this kind, and an entry in
    ``jaxinfer.drafters``. Drafts may be any tokens: with the exact rule they change none that is
    sampled. For rejection they need the distributions that they were drawn from.
    """

    def __init__(self, models: TargetAndDraft, config: EngineConfig) -> None: ...

    def catch_up(self, state: StepState, batch: Batch, wanted: Wanted) -> StepState:
        """Reads what it lacks of the decodes that want drafts, where its own pages lag."""
        ...

    def propose(self, state: StepState, batch: Batch, wanted: Wanted) -> tuple[Drafts, StepState]:
        """Drafts for every decode, and writes the drafts in the state's table of tokens.

        They may be fewer than are wanted. With pages of its own it reads the batch's chunks, too.
        """
        ...

    def read_chunks(self, state: StepState, batch: Batch) -> StepState:
        """Reads the batch's chunks in a step without drafts, where it has pages of its own."""
        ...


def make_drafter(models: TargetAndDraft, config: EngineConfig) -> Drafter:
    """Returns the drafter that ``config`` names, over the models of a step."""
    return importlib.import_module(config.drafter.module).Drafter(models, config)


def draft(
    models: TargetAndDraft, config: EngineConfig, shape: BatchShape, state: StepState, batch: Batch
) -> tuple[Drafts, StepState]:
    """Returns drafts for every decode, and the state with them in its table of tokens.

    No more than the call may yield, and than the sequence may grow by, its own next token aside.
    """
    slots = batch.decode_slots
    if not shape.num_drafts:
        none = Drafts(jnp.zeros((*slots.shape, 0), jnp.int32), jnp.zeros_like(slots))
        if config.drafter.has_pages and shape.num_tiles:
            state = make_drafter(models, config).read_chunks(state, batch)
        return none, state
    lens = state.lens.at[slots].get(mode="fill", fill_value=0)
    ends = batch.slots.of(slots).end_positions
    num_drafts = jnp.minimum(jnp.minimum(batch.max_drafts, batch.max_tokens - 1), ends - lens - 2)
    wanted = Wanted(lens, jnp.clip(num_drafts, 0, shape.num_drafts), shape.num_drafts)
    drafter = make_drafter(models, config)
    state = drafter.catch_up(state, batch, wanted)
    return drafter.propose(state, batch, wanted)
