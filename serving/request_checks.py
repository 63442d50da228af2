"""Checks and defaults of a request that hold by whichever door it comes: plain values, no messages.

Every check raises ``ValueError`` naming the field, the value and the limit.
"""

import secrets

from jaxinfer.request import LIMITS

# New tokens when a request does not say; the .proto promises it.
DEFAULT_MAX_TOKENS = 256


def check_request_id(request_id: str) -> None:
    """Checks an id, which goes into logs and headers: printable ASCII of limited length."""
    LIMITS["request_id_characters"].check("characters of request_id", len(request_id))
    if not (request_id.isascii() and request_id.isprintable()):
        raise ValueError(f"request_id must be printable ASCII, got {request_id!r}")


def check_token_ids(token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Checks ids to be turned into text."""
    LIMITS["num_token_ids"].check("number of token_ids", len(token_ids))
    if token_ids and max(token_ids) >= vocab_size:
        raise ValueError(f"token_ids must be in [0, {vocab_size - 1}], got {max(token_ids)}")


def default_max_tokens(num_prompt_tokens: int, max_model_len: int) -> int:
    """Returns how many tokens fit behind the prompt, up to ``DEFAULT_MAX_TOKENS``.

    Raises ``ValueError`` when none does.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens, which leaves no room for output "
            f"within max_model_len ({max_model_len})"
        )
    return min(DEFAULT_MAX_TOKENS, room)


def random_seed() -> int:
    """Draws the seed of a request that has none."""
    # 53 bits: a client that keeps numbers as doubles can send it back unchanged.
    return secrets.randbits(53)
