"""The text that drafts: what came after the last place in it that looks like its end.

Axis letters: D decodes, K drafts of a step, M max_model_len.
"""

import jax
import jax.numpy as jnp

from jaxinfer.batch import Batch
from jaxinfer.config import EngineConfig
from jaxinfer.speculation.drafter import TargetAndDraft
from jaxinfer.speculation.drafts import Drafts, Wanted, found_drafts
from jaxinfer.step_state import StepState

# Tokens that a place in the text must have in common with its end.
MAX_NGRAM, MIN_NGRAM = 3, 1


class Drafter:
    """Prompt lookup in each decode's own text."""

    def __init__(self, models: TargetAndDraft, config: EngineConfig) -> None:
        vocab_size = models.target.model.vocab_size
        self._vocab_size = vocab_size if config.verify == "rejection" else None

    def catch_up(self, state: StepState, batch: Batch, wanted: Wanted) -> StepState:
        """Lacks nothing: the state's table has the text."""
        return state

    def propose(self, state: StepState, batch: Batch, wanted: Wanted) -> tuple[Drafts, StepState]:
        """Drafts as many as are wanted, or none where nothing in the text looks like its end."""
        slots, lens = batch.decode_slots, wanted.lens
        tokens = state.tokens.at[slots].get(mode="fill", fill_value=0)
        drafts, found = propose_ngrams(tokens, lens + 1, wanted.max_drafts)
        found_here = Drafts(drafts, jnp.minimum(wanted.num_drafts, found))
        return found_drafts(state, slots, lens, found_here, self._vocab_size)

    def read_chunks(self, state: StepState, batch: Batch) -> StepState:
        """Keeps nothing of its own of a chunk."""
        return state


def propose_ngrams(tokens: jax.Array, ends: jax.Array, num_drafts: int) -> tuple[jax.Array, ...]:
    """Prompt lookup (Saxena 2023): what came after the last place that looks like the end.

    ``tokens`` [D, M] int32 of which the first ``ends`` [D] are known, one or more. The place that
    has the most tokens in common with the end is taken, MAX_NGRAM at most, and of these the last.
    What comes after it may run into the end: then it is taken to go on in circles.
    Returns drafts [D, K] int32, and how many of them there are, [D] int32, 0 or K.
    """
    max_len = tokens.shape[1]
    last = ends[:, None] - 1
    places = jnp.arange(max_len, dtype=jnp.int32)[None, :]
    num_common = jnp.zeros(tokens.shape, jnp.int32)
    is_common = places < last
    for back in range(MAX_NGRAM):
        token = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1)
        # What wraps around the beginning is left out.
        is_common &= (jnp.roll(tokens, back, axis=1) == token) & (places >= back)
        num_common += is_common
    best = jnp.max(num_common * max_len + places * (num_common > 0), axis=1, keepdims=True)
    place, is_found = best % max_len, best >= MIN_NGRAM * max_len
    steps = jnp.arange(num_drafts, dtype=jnp.int32)[None, :]
    following = place + 1 + steps % jnp.maximum(last - place, 1)
    drafts = jnp.take_along_axis(tokens, jnp.minimum(following, max_len - 1), axis=1)
    return drafts, jnp.where(is_found[:, 0], num_drafts, 0)
