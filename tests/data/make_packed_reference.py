# pyright: reportMissingImports=false
"""Asks compressed-tensors and auto-round for small random matrices, packed and as floats.

Writes packed_reference.json. Needs, in an environment of its own, torch 2.13, compressed-tensors
0.20 and auto-round 0.16, which packs AWQ and GPTQ as AutoAWQ and AutoGPTQ do:

    python tests/data/make_packed_reference.py
"""

import base64
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

OUTPUTS, INPUTS = 32, 64
PACKAGES = ("torch", "compressed-tensors", "auto-round")


def matrix(bits: int, group: int, is_symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Numbers [out, in] that float16 scales and zero points [out, groups] stand for exactly."""
    groups, levels = INPUTS // group, 1 << bits
    scales = (torch.rand(OUTPUTS, groups) * 0.01 + 0.005).half().float()
    zeros = torch.full((OUTPUTS, groups), levels // 2)
    if not is_symmetric:
        zeros = torch.randint(1, levels, (OUTPUTS, groups))
    values = torch.randint(0, levels, (OUTPUTS, INPUTS))
    repeated = [part.repeat_interleave(group, 1) for part in (zeros, scales)]
    return (values - repeated[0]) * repeated[1], scales, zeros


def compressed(name: str, bits: int, group: int | None, is_symmetric: bool) -> dict[str, Any]:
    """A case of compressed-tensors: what it writes, and what it reads from that."""
    strategy = "channel" if group is None else "group"
    args = QuantizationArgs(
        num_bits=bits, type="int", strategy=strategy, group_size=group, symmetric=is_symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight, scales, zeros = matrix(bits, group or INPUTS, is_symmetric)
    tensors = {
        "weight": weight,
        "weight_scale": scales,
        "weight_zero_point": (zeros - (1 << (bits - 1))).to(torch.int8),
    }
    kinds = {
        "pack-quantized": PackedQuantizationCompressor,
        "int-quantized": IntQuantizationCompressor,
    }
    packed = kinds[name].compress(tensors, scheme)
    numbers = kinds[name].decompress(packed, scheme)["weight"]
    packed["weight_scale"] = packed["weight_scale"].half()
    weights = args.model_dump(mode="json")
    config = {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return case(config, packed, numbers)


def awq(group: int) -> dict[str, Any]:
    """A case of AWQ."""
    weight, scales, zeros = matrix(4, group, False)
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = weight
    parts = {"scales": scales.T.contiguous(), "zeros": zeros.T.contiguous()}
    made = WQLinear_GEMM.from_linear(linear, 4, group, device="cpu", **parts)
    numbers = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, group).T
    config = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group}
    return case(config, made.state_dict(), numbers)


def gptq(bits: int, group: int, is_symmetric: bool) -> dict[str, Any]:
    """A case of GPTQ; the module's product with the unit matrix are its numbers."""
    weight, scales, zeros = matrix(bits, group, is_symmetric)
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = weight
    made = QuantLinear(bits, group, INPUTS, OUTPUTS, False, g_idx=True)
    made.pack(linear, scales, zeros, device="cpu")
    made.post_init()
    tensors = {name: tensor for name, tensor in made.state_dict().items() if name != "wf"}
    made.scales = made.scales.float()
    numbers = made(torch.eye(INPUTS)).T
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": is_symmetric}
    return case(config | {"desc_act": False}, tensors, numbers)


def case(config: dict[str, Any], tensors: Any, numbers: torch.Tensor) -> dict[str, Any]:
    """Returns what a test reads; arrays as base64."""
    stored = {name: encoded(tensor) for name, tensor in tensors.items()}
    return {"config": config, "tensors": stored, "numbers": encoded(numbers.float())}


def encoded(tensor: torch.Tensor) -> dict[str, Any]:
    """An array's dtype, shape and bytes."""
    array = tensor.detach().contiguous().numpy()
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": data}


def main() -> None:
    """Draws and writes all cases."""
    torch.manual_seed(0)
    cases = {
        "packed symmetric": compressed("pack-quantized", 4, 16, True),
        "packed asymmetric": compressed("pack-quantized", 4, 32, False),
        "packed by channel": compressed("pack-quantized", 4, None, True),
        "packed 8 bits": compressed("pack-quantized", 8, 32, False),
        "int8": compressed("int-quantized", 8, None, True),
        "int8 asymmetric": compressed("int-quantized", 8, None, False),
        "awq": awq(32),
        "gptq symmetric": gptq(4, 32, True),
        "gptq asymmetric": gptq(4, 16, False),
        "gptq 8 bits": gptq(8, 32, False),
    }
    source = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    path = Path(__file__).with_name("packed_reference.json")
    path.write_text(json.dumps({"source": source, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
