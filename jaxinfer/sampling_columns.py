"""Inputs of the sampler besides logits: per sampled row, and per slot on the device."""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptionColumns:
    """One column for each of ``request.SAMPLING_OPTIONS``: float32, behind them those in int32.

    The order is that of the packed buffer. All zeros are a padding row.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    top_k: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingColumns(OptionColumns):
    """One row a sampled token, R of them; a padding row is all zeros.

    See ``request.SamplingParams`` for the options, [R] each. ``seeds`` [R, 2] uint32 are low and
    high word, ``choices`` [R] int32 indices among a request's n. ``prompt_lens`` [R] int32: the
    positions before it are prompt. ``ending_ids`` [R, K] int32, padded with -1, are not chosen
    before ``min_tokens`` [R] int32 new tokens. ``num_biases`` [R] int32 counts the slot's biases.
    """

    seeds: jax.Array
    choices: jax.Array
    prompt_lens: jax.Array
    min_tokens: jax.Array
    num_biases: jax.Array
    ending_ids: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotTables:
    """Known tokens and logit biases of each slot's sequence. S slots, M = max_model_len.

    ``tokens`` [S, M] int32 at their positions. ``bias_ids`` [S, B] int32 and ``bias_values`` [S, B]
    float32 mean something in their first ``num_biases`` columns only; the rest, like tokens beyond
    the known ones, is what former occupants left.
    """

    tokens: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
