"""Flags for who guesses tokens, and what they ask for."""

import argparse
import re
from itertools import zip_longest
from typing import Any, Literal

from checkpoints.load import Checkpoint
from checkpoints.stored import QUANTIZATIONS
from jaxinfer.config import EngineConfig

DraftKind = Literal["ngram", "layers", "model"]


def add_draft_options(group: Any) -> None:
    """``--draft``, ``--num-drafts`` and ``--draft-quantize``."""
    defaults = EngineConfig()
    group.add_argument(
        "--draft",
        metavar="WHO",
        help="guess tokens that the model then verifies, several in one step, where that is "
        "faster; no token changes. ngram: what came after the last place that looks like the end; "
        "layers:N: the model's own first N layers; else a smaller model with the same vocabulary, "
        "named as for --model (default: no guesses)",
    )
    group.add_argument(
        "--num-drafts",
        type=int,
        default=defaults.num_drafts,
        metavar="K",
        help="guesses of a sequence in a step, at most (default: %(default)s)",
    )
    group.add_argument(
        "--verify",
        choices=("exact", "rejection"),
        default=defaults.verify,
        help="which guesses are right. exact: what the model would have chosen itself, so that "
        "tokens are those without guesses; rejection: by speculative sampling, which keeps the "
        "distribution but not the tokens of a seed (default: %(default)s)",
    )
    group.add_argument(
        "--draft-quantize",
        choices=QUANTIZATIONS,
        help="what a draft model's matrices are held in (default: as --quantize says)",
    )


def draft_kind(options: argparse.Namespace) -> tuple[DraftKind | None, int]:
    """Who guesses, and with how many of the model's layers where it is those.

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


def draft_model_options(options: argparse.Namespace) -> argparse.Namespace:
    """``options`` as they would be if the draft model were the model."""
    quantize = options.quantize if options.draft_quantize is None else options.draft_quantize
    return argparse.Namespace(**vars(options) | {"model": options.draft, "quantize": quantize})


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
