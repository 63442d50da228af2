"""State that a step leaves on the device for the next one, and the result that it yields."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.engine_spec import EngineSpec
from jaxinfer.kv_cache import abstract_drafter_pages, abstract_kv_pages
from jaxinfer.logprobs import LogprobColumns
from jaxinfer.request import LIMITS
from jaxinfer.sharding import named_sharding
from pallas_kernels.ragged_paged_attention import KVPages

NO_TOKEN = -1  # of a row that had ended, or does not sample
MAX_BIASES = int(LIMITS["num_logit_bias"].high)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """Donated device state. L layers, S slots, M = max_model_len, B biases.

    ``kv_pages``: layer by layer. ``tokens`` [S, M] int32: known tokens of each slot's sequence.
    ``lens`` [S] int32: how many of them have their keys and values in the pages; a decode computes
    the token at that position. ``draft_kv_pages`` are those of a draft model, under the same page
    ids, and ``draft_lens`` [S] int32 says of how many tokens they have keys and values: they may
    lag behind. ``has_ended`` [S] bool: the last token ended the sequence, and steps that were sent
    before the host knew leave the slot alone. ``bias_ids`` [S, B] int32 and ``bias_values`` [S, B]
    float32: logit_bias, as many as the slot's request has.
    """

    kv_pages: tuple[KVPages, ...]
    draft_kv_pages: tuple[KVPages, ...]
    tokens: jax.Array
    lens: jax.Array
    draft_lens: jax.Array
    has_ended: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepResult:
    """The yield of a call of at most C steps, R logits rows, D decodes, N tiles of B rows.

    ``tokens`` [C, R] int32, ``NO_TOKEN`` where a row yields none. ``num_drafted`` [C, D] int32:
    drafts of each decode that were verified. ``draft_lens`` [D + N] int32: what ``StepState`` has
    of it for decodes and tiles, [0] without a draft model. ``logprobs`` [R] are those of the last
    step's tokens, ``prompt_logprobs`` [N, B] those of the token after each chunk row; both zeros
    where nobody wants them.
    """

    tokens: jax.Array
    num_drafted: jax.Array
    draft_lens: jax.Array
    logprobs: LogprobColumns
    prompt_logprobs: LogprobColumns


def abstract_state(spec: EngineSpec) -> StepState:
    """Returns the shapes and shardings of the state of an engine."""
    config, mesh = spec.config, spec.mesh
    whole = named_sharding(mesh)
    slots = config.max_num_seqs

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    dtype = spec.dtypes.kv_cache
    return StepState(
        kv_pages=abstract_kv_pages(
            spec.model, config.num_pages, config.page_size, dtype, mesh, config.attention
        ),
        draft_kv_pages=abstract_drafter_pages(spec, config.num_pages),
        tokens=array((slots, config.max_model_len), jnp.int32),
        lens=array((slots,), jnp.int32),
        draft_lens=array((slots,), jnp.int32),
        has_ended=array((slots,), jnp.bool_),
        bias_ids=array((slots, MAX_BIASES), jnp.int32),
        bias_values=array((slots, MAX_BIASES), jnp.float32),
    )
