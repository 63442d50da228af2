"""Verification by rejection: the target's distribution, but not the tokens of plain decoding.

Speculative sampling as Leviathan et al. 2023 and Chen et al. 2023 have it. A draft x drawn from the
draft's q is accepted with probability min(1, p(x) / q(x)); at the first that is not, the token is
drawn from max(p - q, 0) / sum, which makes it p's in all. Axis letters: D decodes, K drafts,
V vocab.
"""

import jax
import jax.numpy as jnp

from jaxinfer.sampling import gumbel_noise
from jaxinfer.speculation.drafts import Drafts

# Noises that must not depend on each other, beside the position's own (0), which the token after
# the last draft is drawn with.
DRAFT_NOISE, ACCEPTANCE, RESIDUAL_NOISE = 1, 2, 3


def after_rejection(
    drafts: Drafts,
    target_logprobs: jax.Array,
    sampled: jax.Array,
    positions: jax.Array,
    seeds: jax.Array,
    choices: jax.Array,
) -> jax.Array:
    """Returns the draft where it is accepted, else the token instead, [D, K + 1] int32.

    ``drafts`` of every decode with the log-probabilities [D, K, V] that they were drawn from;
    ``target_logprobs`` [D, K + 1, V] are the target's at ``positions`` [D, K + 1], ``sampled``
    [D, K + 1] its own draws. ``seeds`` [D, 2] and ``choices`` [D] as for ``gumbel_noise``. What
    comes after the first draft that is not accepted means nothing.
    """
    assert drafts.logprobs is not None
    num_rows, most = drafts.token_ids.shape
    vocab_size = target_logprobs.shape[-1]

    def noise(size: int, use: int) -> jax.Array:
        at = positions[:, :most].reshape(-1)
        of_seeds = jnp.repeat(seeds, most, axis=0)
        found = gumbel_noise(of_seeds, jnp.repeat(choices, most), at, size, use)
        return found.reshape(num_rows, most, size)

    def of_drafts(logprobs: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logprobs, drafts.token_ids[..., None], axis=-1)[..., 0]

    wanted = target_logprobs[:, :most]
    # -log(-log u) + log(-log u) = 0: log u from the same noise that draws tokens.
    log_uniform = -jnp.exp(-noise(1, ACCEPTANCE)[..., 0])
    accepted = log_uniform < of_drafts(wanted) - of_drafts(drafts.logprobs)
    residual = jnp.maximum(jnp.exp(wanted) - jnp.exp(drafts.logprobs), 0)
    # Where p and q are the same to the last bit nothing is left, and nothing is rejected.
    draws = jnp.log(residual) + noise(vocab_size, RESIDUAL_NOISE)
    instead = jnp.argmax(draws, axis=-1).astype(jnp.int32)
    is_draft = jnp.arange(most)[None, :] < drafts.num_drafts[:, None]
    chosen = jnp.where(is_draft, jnp.where(accepted, drafts.token_ids, instead), sampled[:, :most])
    return jnp.concatenate([chosen, sampled[:, most:]], axis=1)
