"""Small random models whose matrices are packed as AWQ, GPTQ and compressed-tensors do it.

The packers follow those of the tools, a place in a word at a time: AutoAWQ's
``WQLinear_GEMM.from_linear``, AutoGPTQ's ``QuantLinear.pack`` and compressed-tensors'
``pack_to_int32``.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.hugging_face.family_folder import DTYPES, write_folder
from tests.jaxinfer.models.random_checkpoint import CASES


@dataclass(frozen=True)
class Kind:
    """A way in which matrices are packed."""

    layout: str
    bits: int = 4
    group: int = 32
    symmetric: bool = False
    scales: str = "F16"
    shuffled: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` as the tool writes it."""
        if self.layout == "awq":
            method = {"quant_method": "awq", "version": "gemm", "zero_point": not self.symmetric}
            return {**method, "bits": self.bits, "group_size": self.group}
        if self.layout in ("gptq", "gptq_v2"):
            method = {"quant_method": "gptq", "checkpoint_format": self.layout}
            order = {"desc_act": self.shuffled, "sym": self.symmetric}
            return {**method, **order, "bits": self.bits, "group_size": self.group}
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "strategy": "channel" if self.group == -1 else "group",
            "group_size": None if self.group == -1 else self.group,
            "symmetric": self.symmetric,
            "dynamic": False,
            "observer": "minmax",
        }
        activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": activations if self.layout == "int-quantized" else None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }


@dataclass(frozen=True)
class Matrix:
    """Integers ``values`` [out, in] and ``zeros`` [out, groups] from 0 on; ``scales``.

    ``groups_of`` [in] is the group of each input.
    """

    values: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups_of: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        """w = (q - z) s, in float64."""
        zeros = self.zeros.astype(np.float64)[:, self.groups_of]
        return (self.values - zeros) * self.scales.astype(np.float64)[:, self.groups_of]


def draw_matrix(kind: Kind, name: str, shape: tuple[int, int]) -> Matrix:
    """A random matrix [out, in] with standard deviation near ``2 / sqrt(in)``."""
    outputs, inputs = shape
    random = np.random.RandomState(zlib.crc32(name.encode()))
    group = inputs if kind.group == -1 else kind.group
    groups, levels = -(-inputs // group), 1 << kind.bits
    zeros = np.full((outputs, groups), levels // 2)
    if not kind.symmetric:
        zeros = random.randint(levels // 4, levels - levels // 4, zeros.shape)
        zeros[0, 0], zeros[-1, -1] = 1, levels - 1
    step = 2 / inputs**0.5 * 3.5 / levels
    scales = (step * random.uniform(0.5, 1.5, zeros.shape)).astype(DTYPES[kind.scales])
    groups_of = np.arange(inputs) // group
    if kind.shuffled:
        random.shuffle(groups_of)
    return Matrix(random.randint(levels, size=shape), zeros, scales, groups_of)


def pack_words(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Integers [rows, N] as int32 words [rows, ceil(N bits / 32)], the lowest bits first."""
    count = 32 // bits
    numbers = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % count))).astype(np.uint32)
    words = np.zeros((numbers.shape[0], numbers.shape[1] // count), np.uint32)
    for place in range(count):
        number = order[place] if order else place
        words |= numbers[:, number::count] << np.uint32(bits * place)
    return words.view(np.int32)


def pack(kind: Kind, stem: str, matrix: Matrix) -> dict[str, np.ndarray]:
    """The tensors of a matrix called ``stem``."""
    values, zeros, bits = matrix.values, matrix.zeros, kind.bits
    if kind.layout == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": pack_words(values.T, bits, order),
            "qzeros": pack_words(zeros.T, bits, order),
            "scales": matrix.scales.T,
        }
    elif kind.layout in ("gptq", "gptq_v2"):
        stored = zeros - 1 if kind.layout == "gptq" else zeros
        tensors = {
            "qweight": pack_words(values, bits).T,
            "qzeros": pack_words(stored.T, bits),
            "scales": matrix.scales.T,
            "g_idx": matrix.groups_of.astype(np.int32),
        }
    elif kind.layout == "pack-quantized":
        tensors = {
            "weight_packed": pack_words(values, bits),
            "weight_scale": matrix.scales,
            "weight_shape": np.array(values.shape),
        }
        if not kind.symmetric:
            tensors["weight_zero_point"] = pack_words(zeros.T, bits).T
        if kind.shuffled:
            tensors["weight_g_idx"] = matrix.groups_of.astype(np.int32)
    else:
        tensors = {"weight": (values - 128).astype(np.int8), "weight_scale": matrix.scales}
        if not kind.symmetric:
            tensors["weight_zero_point"] = (zeros - 128).astype(np.int8)
    return {f"{stem}.{name}": np.ascontiguousarray(array) for name, array in tensors.items()}


def is_packed(name: str, shape: list[int]) -> bool:
    """Tells what tools quantize: projections, not the ends and not routers."""
    is_end = "embed" in name or "lm_head" in name
    return (
        len(shape) == 2 and not is_end and not name.endswith(("mlp.gate.weight", "moe.gate.weight"))
    )


def packed_matrices(case: str, kind: Kind) -> dict[str, Matrix]:
    """The packed matrices of a case, by the names that they have as floats."""
    return {
        name: draw_matrix(kind, name, (shape[0], shape[1]))
        for name, shape in CASES[case]["tensors"].items()
        if is_packed(name, shape)
    }


def write_packed(
    folder: Path,
    case: str,
    kind: Kind,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> dict[str, Matrix]:
    """A folder of ``case``; what was packed, by its name.

    ``config`` is changed in the ``quantization_config``, ``tensors`` come instead or on top (None:
    not at all).
    """
    matrices = packed_matrices(case, kind)
    packed: dict[str, Any] = {}
    for name, matrix in matrices.items():
        packed |= pack(kind, name.removesuffix(".weight"), matrix)
    packed |= tensors or {}
    changes = {"quantization_config": {**kind.config, **(config or {})}}
    extra = {name: array for name, array in packed.items() if array is not None}
    write_folder(folder, case, "F16", 1, "", changes, extra, without=matrices)
    return matrices


AWQ = Kind("awq")
GPTQ = Kind("gptq", symmetric=True)
KINDS: dict[str, Kind] = {
    "awq": AWQ,
    "awq symmetric": replace(AWQ, symmetric=True),
    "awq, groups of all inputs, bf16": Kind("awq", group=-1, scales="BF16"),
    "gptq": GPTQ,
    "gptq with zeros": replace(GPTQ, symmetric=False, group=16),
    "gptq v2 with zeros": Kind("gptq_v2"),
    "gptq 8 bits": Kind("gptq", bits=8, symmetric=True),
    "gptq 8 bits with zeros, groups of all inputs": Kind("gptq", bits=8, group=-1),
    "gptq 8 bits, groups of all inputs": Kind("gptq", bits=8, group=-1, symmetric=True),
    "packed": Kind("pack-quantized", symmetric=True),
    "packed with zeros": Kind("pack-quantized", scales="BF16"),
    "packed by channel": Kind("pack-quantized", group=-1, symmetric=True, scales="BF16"),
    "packed 8 bits": Kind("pack-quantized", bits=8, symmetric=True),
    "int8": Kind("int-quantized", bits=8, group=-1, symmetric=True, scales="BF16"),
    "int8 with zeros": Kind("naive-quantized", bits=8, group=-1),
    "int8 in groups": Kind("int-quantized", bits=8, group=16, symmetric=True),
}
SHUFFLED: dict[str, Kind] = {
    "gptq": replace(GPTQ, shuffled=True),
    "gptq with zeros": Kind("gptq", shuffled=True),
    "packed": Kind("pack-quantized", symmetric=True, shuffled=True),
}
