"""What the sampler reads besides logits: per sampled row, and per slot on the device."""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingColumns:
    """One row a sampled token, R of them; a padding row is all zeros.

    See ``request.SamplingParams`` for ``temperature`` (0: greedy), ``top_k`` (0: off), ``top_p``,
    ``min_p`` and the penalties: [R] float32, ``top_k`` int32. ``seeds`` [R, 2] uint32 are low and
    high word, ``choices`` [R] int32 indices among a request's n. ``prompt_lens`` [R] int32: the
    positions before it are prompt. ``ending_ids`` [R, K] int32, padded with -1, are not chosen
    before ``min_tokens`` [R] int32 new tokens. ``num_biases`` [R] int32 counts the slot's biases.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seeds: jax.Array
    choices: jax.Array
    prompt_lens: jax.Array
    min_tokens: jax.Array
    num_biases: jax.Array
    ending_ids: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotTables:
    """Of each slot's sequence: known tokens and logit biases. S slots, M = max_model_len.

    ``tokens`` [S, M] int32 at their positions. ``bias_ids`` [S, B] int32 and ``bias_values`` [S, B]
    float32 mean something in their first ``num_biases`` columns only; the rest, like tokens beyond
    the known ones, is what former occupants left.
    """

    tokens: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
