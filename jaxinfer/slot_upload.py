"""Arrays that a newly admitted sequence needs on the device and that its chunks do not bring."""

import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.request import SamplingParams
from jaxinfer.schedule import ScheduledSequence
from jaxinfer.step_state import MAX_BIASES

# A slot, its known tokens [M] and their number, and its biases [B]: the arguments of ``set_slot``.
SlotUpload = tuple[np.int32, np.ndarray, np.int32, np.ndarray, np.ndarray]


def slot_upload(chunk: ScheduledSequence, config: EngineConfig) -> SlotUpload | None:
    """Returns what the device must be given before a sequence's first chunk, None for nothing.

    Tokens found in the prefix cache pass through no chunk: penalties count them, drafts are found
    in them, and a draft model that lags catches up with them.
    """
    sampling, known = chunk.request.sampling, chunk.cached_token_ids
    lags = config.draft == "model" and chunk.num_draft_cached < len(known)
    if not (_has_penalty(sampling) or lags or config.draft == "ngram"):
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


def _has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )
