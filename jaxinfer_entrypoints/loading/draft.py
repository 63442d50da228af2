"""The drafter that options ask for, and the vocabulary that a draft model must have."""

import re
from itertools import zip_longest
from typing import Literal

from checkpoints.load import Checkpoint
from jaxinfer_entrypoints.loading.options import LoadOptions

DraftKind = Literal["ngram", "layers", "model"]


def draft_kind(options: LoadOptions) -> tuple[DraftKind | None, int]:
    """Returns who drafts, and with how many of the model's layers where it is those.

    Raises ``ValueError`` for what cannot be.
    """
    draft = options.draft
    if draft is None or draft == "ngram":
        kind, num_layers = draft, 0
    elif not draft.strip():
        raise ValueError("--draft names nobody: ngram, layers:N or a model")
    elif draft.startswith("layers:"):
        if not re.fullmatch(r"layers:[1-9]\d{0,3}", draft):
            raise ValueError(f"--draft layers:N needs a number of layers from 1 on, got {draft!r}")
        kind, num_layers = "layers", int(draft.removeprefix("layers:"))
    else:
        kind, num_layers = "model", 0
    if options.draft_quantize is not None and kind != "model":
        raise ValueError("--draft-quantize needs a draft model: --draft MODEL")
    return kind, num_layers


def check_vocabulary(target: Checkpoint, draft: Checkpoint, name: str) -> None:
    """Raises ``ValueError`` where the draft's tokens are not the target's.

    A vocabulary may be longer than its tokens: what fills it up is no token.
    """
    tokens, others = target.tokenizer.tokens, draft.tokenizer.tokens
    for token_id, (ours, theirs) in enumerate(zip_longest(tokens, others, fillvalue="")):
        if ours != theirs and not (_is_filler(ours) and _is_filler(theirs)):
            raise ValueError(
                f"--draft {name} has another vocabulary than the model: token {token_id} is "
                f"{theirs!r:.60} there and {ours!r:.60} here; a draft model must have the same"
            )


def _is_filler(token: str) -> bool:
    return not token or re.fullmatch(r"\[PAD\d+\]", token) is not None
