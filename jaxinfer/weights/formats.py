"""The table of formats by name."""

from collections.abc import Mapping

from jaxinfer.weights.float8 import Float8Format
from jaxinfer.weights.grouped import GroupedFormat
from jaxinfer.weights.int8 import Int8Format
from jaxinfer.weights.protocol import Format

# What --quantize takes; the table of the documentation says what each costs and brings.
FORMATS: Mapping[str, Format] = {
    "int8": Int8Format(),
    "int8-dynamic": Int8Format(8),
    "int8-dynamic-64": Int8Format(8, 64),
    "fp8": Float8Format(),
    "int4": GroupedFormat(4, 32, "float16"),
    "int4-64": GroupedFormat(4, 64, "float16"),
    "int4-128": GroupedFormat(4, 128, "float16"),
    "int4-symmetric": GroupedFormat(4, 32),
    "int4-symmetric-64": GroupedFormat(4, 64),
    "int4-symmetric-128": GroupedFormat(4, 128),
}


def parse_format(name: str) -> Format:
    """Returns the format called ``name``. Raises ``ValueError`` listing what there is."""
    if name not in FORMATS:
        raise ValueError(f"no format {name!r:.40} of matrices; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def kinds_of_formats() -> Mapping[str, type[Format]]:
    """Returns the classes of formats by the names that converted folders have for them."""
    return {type(form).__name__: type(form) for form in FORMATS.values()}
