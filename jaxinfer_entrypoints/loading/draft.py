"""The vocabulary that a draft model must have."""

import re
from itertools import zip_longest

from checkpoints.load import Checkpoint


def check_vocabulary(target: Checkpoint, draft: Checkpoint, name: str) -> None:
    """Raises ``ValueError`` where the draft's tokens are not the target's.

    A vocabulary may be longer than its tokens: what fills it up is no token. Tokens for which a
    model has no embedding are in no prompt and in no text of it.
    """
    tokens, others = (one.tokenizer.tokens[: one.model.vocab_size] for one in (target, draft))
    for token_id, (ours, theirs) in enumerate(zip_longest(tokens, others, fillvalue="")):
        if ours != theirs and not (_is_filler(ours) and _is_filler(theirs)):
            raise ValueError(
                f"--draft {name} has another vocabulary than the model: token {token_id} is "
                f"{theirs!r:.60} there and {ours!r:.60} here; a draft model must have the same"
            )


def _is_filler(token: str) -> bool:
    return not token or re.fullmatch(r"\[PAD\d+\]", token) is not None
