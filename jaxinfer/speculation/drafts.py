"""Drafted tokens, on their way from a drafter to verification."""

from typing import NamedTuple

import jax


class Drafts(NamedTuple):
    """``token_ids`` [D, K] int32, of which ``num_drafts`` [D] are to be verified.

    ``logprobs`` [D, K, V]: the distributions they were drawn from, where that matters.
    """

    token_ids: jax.Array
    num_drafts: jax.Array
    logprobs: jax.Array | None = None
