"""Drafted tokens, on their way from a drafter to verification."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.step_state import StepState


class Drafts(NamedTuple):
    """``token_ids`` [D, K] int32, of which ``num_drafts`` [D] are to be verified.

    ``logprobs`` [D, K, V]: the distributions they were drawn from, where that matters.
    """

    token_ids: jax.Array
    num_drafts: jax.Array
    logprobs: jax.Array | None = None


class Wanted(NamedTuple):
    """Drafts that a step may verify: ``num_drafts`` [D] int32 of a decode, ``max_drafts`` at most.

    ``lens`` [D] int32: tokens of each decode that have keys and values. The token at that position
    is known, too; drafts come after it.
    """

    lens: jax.Array
    num_drafts: jax.Array
    max_drafts: int


def write_drafts(
    state: StepState, slots: jax.Array, at: jax.Array, tokens: jax.Array, is_real: jax.Array
) -> StepState:
    """Puts ``tokens`` [D] in the table of tokens, where they ``is_real`` [D]."""
    written = jnp.where(is_real, slots, state.tokens.shape[0])
    return replace(state, tokens=state.tokens.at[written, at].set(tokens, mode="drop"))


def found_drafts(
    state: StepState, slots: jax.Array, lens: jax.Array, drafts: Drafts, vocab_size: int | None
) -> tuple[Drafts, StepState]:
    """Drafts that are certain, not drawn, and the state that has them after ``lens`` [D] tokens.

    ``vocab_size``: where verification asks for their distributions, which are of one token each.
    """
    for number in range(drafts.token_ids.shape[1]):
        is_real = number < drafts.num_drafts
        state = write_drafts(state, slots, lens + 1 + number, drafts.token_ids[:, number], is_real)
    if vocab_size is None:
        return drafts, state
    is_draft = drafts.token_ids[..., None] == jnp.arange(vocab_size)[None, None, :]
    return drafts._replace(logprobs=jnp.where(is_draft, 0.0, -jnp.inf)), state
