"""The tokens of a model: those that a draft model must have too, and rows that are no token."""

from collections.abc import Sequence
from itertools import zip_longest

from checkpoints.load import Checkpoint


def check_vocabulary(target: Checkpoint, draft: Checkpoint, name: str) -> None:
    """Raises ``ValueError`` where the draft's tokens are not the target's.

    A vocabulary may be longer than its tokens: what fills it up is no token. Tokens for which a
    model has no embedding are in no prompt and in no text of it.
    """
    tokens, others = (one.tokenizer.tokens[: one.model.vocab_size] for one in (target, draft))
    for token_id, (ours, theirs) in enumerate(zip_longest(tokens, others, fillvalue="")):
        if ours != theirs and not (_is_filler(ours, token_id) and _is_filler(theirs, token_id)):
            raise ValueError(
                f"--draft {name} has another vocabulary than the model: token {token_id} is "
                f"{theirs!r:.60} there and {ours!r:.60} here; a draft model must have the same"
            )


def unused_tokens(tokens: Sequence[str], vocab_size: int) -> tuple[tuple[int, int], ...]:
    """Returns the ranges [first, end) of ids below ``vocab_size`` that none of ``tokens`` has."""
    unused = [token_id for token_id, token in enumerate(tokens) if _is_filler(token, token_id)]
    unused = [token_id for token_id in unused if token_id < vocab_size]
    unused += range(len(tokens), vocab_size)
    ranges: list[tuple[int, int]] = []
    for token_id in unused:
        first = ranges.pop()[0] if ranges and ranges[-1][1] == token_id else token_id
        ranges.append((first, token_id + 1))
    return tuple(ranges)


def _is_filler(token: str, token_id: int) -> bool:
    """Tells fillers from tokens: nothing, or the name that converters to GGUF give to it."""
    return not token or token == f"[PAD{token_id}]"
