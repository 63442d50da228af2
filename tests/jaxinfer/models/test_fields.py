"""Fields of a config.json that cannot be."""

from typing import Any

import pytest

from jaxinfer.models.fields import Fields


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), 0, -1, True, "1", None])
def test_numbers_that_are_refused(value: Any) -> None:
    """A whole number may be finite and yet beyond every float."""
    with pytest.raises(ValueError, match=r"x (must be a positive number|is missing)"):
        Fields({"x": value}).number("x")
    with pytest.raises(ValueError, match="x must be at most 4096 positive numbers"):
        Fields({"x": [value]}).numbers("x")
