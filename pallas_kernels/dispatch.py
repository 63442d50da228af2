"""Picks the implementation of an operation: the first backend that does not decline.

A backend declines a case by raising ``NotImplementedError`` with its reason while it is traced.
"""

from collections.abc import Callable, Mapping
from typing import Any


def runs_on(backend: Any, platform: str) -> bool:
    """Tells if a backend, a module that declares its ``PLATFORMS``, runs on one; None is any."""
    return backend.PLATFORMS is None or platform in backend.PLATFORMS


def dispatch(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    backend: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls ``implementations[backend]``, or without a backend the first that does not decline.

    Raises ``ValueError`` for an unknown backend and ``NotImplementedError`` with every backend's
    reason when all decline.
    """
    if backend is not None and backend not in implementations:
        raise ValueError(
            f"{operation} has no backend {backend!r}; there are {', '.join(implementations)}"
        )
    candidates = implementations if backend is None else {backend: implementations[backend]}
    reasons = []
    for name, implementation in candidates.items():
        try:
            return implementation(*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(f"no backend of {operation} takes this case: {'; '.join(reasons)}")
