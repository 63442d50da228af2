"""Names of formats, and what each is of."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GROUPS = (8, 16, 32, 64, 128)


def _check(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r:.40}")


@dataclass(frozen=True)
class Int8Format:
    """8-bit integers with a float32 scale for each output.

    ``activation_bits`` and ``activation_group``: see ``int8_matmul``.
    """

    activation_bits: int = 16
    activation_group: int | None = None

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for what there is not."""
        _check("activation_bits", self.activation_bits, (8, 16))
        _check("activation_group", self.activation_group, (None, *GROUPS))


@dataclass(frozen=True)
class GroupedFormat:
    """Integers of ``bits`` with a scale for each ``group`` inputs of an output.

    ``scales`` and ``minimums`` are dtypes; without ``minimums`` integers are symmetric.
    """

    bits: int
    group: int
    minimums: str | None = None
    scales: str = "float16"

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for what there is not."""
        _check("bits", self.bits, (4, 8))
        _check("group", self.group, GROUPS)
        _check("minimums", self.minimums, (None, "float16", "float32"))
        _check("scales", self.scales, ("float16", "float32"))


@dataclass(frozen=True)
class Float8Format:
    """8-bit floats (e4m3) with a float32 scale for each output, times activations in 8-bit floats.

    For devices that multiply them: see ``check_device``.
    """


Format = Int8Format | GroupedFormat | Float8Format

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
    """The format called ``name``. Raises ``ValueError`` listing what there is."""
    if name not in FORMATS:
        raise ValueError(f"no format {name!r:.40} of matrices; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def check_device(name: str, device: Any) -> None:
    """Raises ``ValueError`` where ``device`` cannot multiply what the format ``name`` holds."""
    if not isinstance(FORMATS.get(name), Float8Format):
        return
    if device.platform == "gpu":
        has_float8 = float(device.compute_capability) >= 8.9
    else:
        has_float8 = device.platform == "tpu" and re.search(r"TPU ?v?7", device.device_kind)
    if not has_float8:
        raise ValueError(
            f"{name} needs products of 8-bit floats: NVIDIA GPUs of compute capability 8.9 or "
            f"more, TPU v7; this is {device.device_kind or device.platform}: give int8"
        )
