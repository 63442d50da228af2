"""Cases that are the same test over again: a few in ``make test``, all in ``make test-all``."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thorough_beyond(few: Collection[Any], cases: Iterable[Any], subject: str) -> list[Any]:
    """Returns ``cases`` for ``parametrize``, of which all but the ``few`` are marked thorough.

    Raises ``ValueError`` if one of the ``few`` is no case.
    """
    several = list(cases)
    if unknown := [case for case in few if case not in several]:
        raise ValueError(f"no such case: {unknown}")
    return [case if case in few else _marked(case, subject) for case in several]


def _marked(case: Any, subject: str) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.thorough(subject))
