"""Tokens and the rows of the embedding: a few special tokens may have none.

Such are for what the text model never sees (Gemma 3's place of an image); a prompt with one is
refused where it is encoded. Ordinary tokens come in any text, and each needs its row.
"""

from collections.abc import Collection

# Far above what there is (1); nothing is allocated for more.
MAX_TOKENS_WITHOUT_ROW = 1024


def check_token_rows(num_tokens: int, num_rows: int, special_ids: Collection[int]) -> None:
    """Raises ``ValueError`` for a token that has no row and is not among ``special_ids``."""
    problem = f"{num_tokens} tokens, but the embedding has {num_rows} rows"
    if num_tokens > num_rows + MAX_TOKENS_WITHOUT_ROW:
        raise ValueError(problem)
    special = set(special_ids)
    for token_id in range(num_rows, num_tokens):
        if token_id not in special:
            raise ValueError(f"{problem}, and token {token_id} is no special one")
