"""TPUs by the names that people use: generation, chips, topology, peaks. Imports no JAX."""

import re
from dataclasses import dataclass

from jaxinfer_entrypoints.machine.units import GIB


@dataclass(frozen=True)
class TpuGeneration:
    """One generation of chips: what a chip has, and which slices exist.

    ``device_kinds``: how its devices call themselves. ``cores_per_chip``: names such as v5p-8 count
    cores. ``hbm_bytes``: what the compiler lets one program use, a little less than the chip has.
    ``hbm_bytes_per_second`` and ``bf16_flops_per_second``: peaks of a chip as published at
    cloud.google.com/tpu/docs. ``slices``: chips -> the topology's shape; empty where the compiler
    cannot be asked.
    """

    name: str
    device_kinds: tuple[str, ...]
    slices: dict[int, str]
    hbm_bytes: int = 0
    hbm_bytes_per_second: float = 0.0
    bf16_flops_per_second: float = 0.0
    chips_per_host: int = 4
    cores_per_chip: int = 1
    aliases: tuple[str, ...] = ()

    def slice_name(self, num_chips: int) -> str:
        """Such as v5e-8; in cores where the generation's names count cores."""
        return f"{self.name}-{num_chips * self.cores_per_chip}"

    @property
    def slice_names(self) -> list[str]:
        """All names that exist, smallest first."""
        return [self.slice_name(chips) for chips in self.slices]


_SQUARES = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}

GENERATIONS: dict[str, TpuGeneration] = {
    generation.name: generation
    for generation in (
        # To the compiler a v4 is its two cores with half the memory each; at run time it is one.
        TpuGeneration("v4", ("TPU v4",), {}, cores_per_chip=2),
        TpuGeneration(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            _SQUARES,
            hbm_bytes=int(15.75 * GIB),
            hbm_bytes_per_second=819e9,
            bf16_flops_per_second=197e12,
            chips_per_host=8,
            aliases=("v5litepod", "v5lite"),
        ),
        TpuGeneration(
            "v5p",
            ("TPU v5", "TPU v5p"),
            _CUBES,
            hbm_bytes=int(95.73 * GIB),
            hbm_bytes_per_second=2765e9,
            bf16_flops_per_second=459e12,
            cores_per_chip=2,
        ),
        TpuGeneration(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            _SQUARES,
            hbm_bytes=int(31.24 * GIB),
            hbm_bytes_per_second=1640e9,
            bf16_flops_per_second=918e12,
            chips_per_host=8,
        ),
    )
}


@dataclass(frozen=True)
class TpuTarget:
    """A generation and how many chips of it; None where the name does not say."""

    generation: TpuGeneration
    num_chips: int | None

    @property
    def name(self) -> str:
        """As it was asked for, in the form v5e-8."""
        if self.num_chips is None:
            return self.generation.name
        return self.generation.slice_name(self.num_chips)


def parse_target(name: str) -> TpuTarget:
    """``v5e``, ``v5e-8``, ``v5litepod-8``, ``v5p-8`` (8 cores: 4 chips), ...

    Raises ``ValueError`` that lists what exists, for an unknown generation or size.
    """
    match = re.fullmatch(r"(v[0-9][a-z]*)(?:-(0|[1-9][0-9]{0,5}))?", name.lower())
    generation = _generation(match[1]) if match else None
    if match is None or generation is None:
        raise ValueError(
            f"no TPU is called {name[:40]!r}; there are {', '.join(GENERATIONS)}, each alone or "
            f"with a size: {', '.join(GENERATIONS['v5e'].slice_names[:3])}, v5p-8, ..."
        )
    if match[2] is None:
        return TpuTarget(generation, None)
    chips, rest = divmod(int(match[2]), generation.cores_per_chip)
    sizes = generation.slices or _CUBES  # v4 and v5p come in the same shapes
    if rest or chips not in sizes:
        names = ", ".join(generation.slice_name(chips) for chips in sizes)
        cores = " (names count cores, 2 a chip)" if generation.cores_per_chip > 1 else ""
        raise ValueError(f"there is no {name}; {generation.name} comes as {names}{cores}")
    return TpuTarget(generation, chips)


def generation_of_kind(device_kind: str) -> TpuGeneration:
    """The generation whose devices call themselves ``device_kind``; ``ValueError`` if unknown."""
    for generation in GENERATIONS.values():
        if device_kind in generation.device_kinds:
            return generation
    raise ValueError(f"no TPU generation has devices called {device_kind!r}")


def _generation(name: str) -> TpuGeneration | None:
    for generation in GENERATIONS.values():
        if name in (generation.name, *generation.aliases):
            return generation
    return None
