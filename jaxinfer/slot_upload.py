"""Arrays that a newly admitted sequence needs on the device and that its chunks do not bring.

What they are is decided on the host; the program that writes them is here, too.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.config import EngineConfig
from jaxinfer.schedule import ScheduledSequence
from jaxinfer.sharding import named_sharding
from jaxinfer.step_state import MAX_BIASES, StepState

# A slot, its known tokens [M] and their number, and its biases [B]: the arguments of ``set_slot``.
SlotUpload = tuple[np.int32, np.ndarray, np.int32, np.ndarray, np.ndarray]


def slot_upload(chunk: ScheduledSequence, config: EngineConfig) -> SlotUpload | None:
    """Returns what the device must be given before a sequence's first chunk, None for nothing.

    Tokens found in the prefix cache pass through no chunk: penalties count them, some drafters read
    them, and one whose pages lag catches up with them.
    """
    sampling, known = chunk.request.sampling, chunk.cached_token_ids
    lags = config.drafter.has_pages and chunk.num_drafter_kv_tokens < len(known)
    if not (sampling.has_penalty or lags or config.drafter.reads_text):
        known = ()
    if not known and not sampling.logit_bias:
        return None
    tokens = np.zeros(config.max_model_len, np.int32)
    tokens[: len(known)] = known
    bias_ids = np.zeros(MAX_BIASES, np.int32)
    bias_values = np.zeros(MAX_BIASES, np.float32)
    for i, (token_id, bias) in enumerate(sampling.logit_bias):
        bias_ids[i], bias_values[i] = token_id, bias
    return np.int32(chunk.slot), tokens, np.int32(len(known)), bias_ids, bias_values


def set_slot(
    state: StepState,
    slot: jax.Array,
    tokens: jax.Array,
    num_tokens: jax.Array,
    bias_ids: jax.Array,
    bias_values: jax.Array,
) -> StepState:
    """Writes what a newly admitted sequence cannot bring as rows.

    ``tokens`` [M] int32: the first ``num_tokens`` were found in the prefix cache and pass through
    no chunk, but penalties count them. ``bias_ids`` and ``bias_values`` [B].
    """
    is_known = jnp.arange(tokens.shape[0]) < num_tokens
    return replace(
        state,
        tokens=state.tokens.at[slot].set(jnp.where(is_known, tokens, state.tokens[slot])),
        bias_ids=state.bias_ids.at[slot].set(bias_ids),
        bias_values=state.bias_values.at[slot].set(bias_values),
    )


def lower_set_slot(config: EngineConfig, state: StepState, mesh: Mesh) -> Any:
    """Lowers ``set_slot``, ready to compile."""
    whole = named_sharding(mesh)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    jitted = jax.jit(
        set_slot,
        donate_argnums=(0,),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    return jitted.trace(
        state,
        array(np.int32),
        array(np.int32, config.max_model_len),
        array(np.int32),
        array(np.int32, MAX_BIASES),
        array(np.float32, MAX_BIASES),
    ).lower()
