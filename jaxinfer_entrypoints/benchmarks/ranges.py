"""The check of a benchmark's numbers, in the words of its flags. Imports nothing."""

from collections.abc import Sequence


def check_range(name: str, values: int | Sequence[int], low: int, high: int) -> None:
    """Raises ``ValueError`` naming the flag of ``name`` where a value is not in [low, high]."""
    several = [values] if isinstance(values, int) else values
    if not all(low <= value <= high for value in several):
        got = values if isinstance(values, int) else [*values]
        raise ValueError(f"--{name.replace('_', '-')} must be between {low} and {high}, got {got}")
