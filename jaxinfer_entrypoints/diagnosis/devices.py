"""Devices, and what would fit on them: doctor.py runs this in a process of its own.

Looking for devices may hang or end the process, so it is done in one that can be given up.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the packages lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax

from checkpoints.configs import model_config
from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.kv_cache import page_bytes
from jaxinfer.sharding import Device, make_mesh
from jaxinfer_entrypoints.command_line.engine import parse_load_options
from jaxinfer_entrypoints.loading.devices import pick_devices
from jaxinfer_entrypoints.loading.options import DEFAULT_MODEL, LoadOptions
from jaxinfer_entrypoints.loading.sizes import engine_config
from jaxinfer_entrypoints.memory.plan import parameter_bytes
from jaxinfer_entrypoints.memory.usage import free_bytes

FIT_KEYS = ("parameter_bytes", "kv_token_bytes", "kv_tokens", "most_kv_tokens", "refusal")
LLAMA_3_8B, LLAMA_3_2_1B = model_config("llama-3-8b"), model_config("llama-3.2-1b")
# Models that are not shipped as configurations are told by what differs from one that is; that 3.1
# scales frequencies takes no memory.
SHAPES = {
    DEFAULT_MODEL: model_config(DEFAULT_MODEL),
    "Llama 3.2 1B": LLAMA_3_2_1B,
    "Llama 3.2 3B": dataclasses.replace(
        LLAMA_3_2_1B,
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
    ),
    "Llama 3.1 8B": dataclasses.replace(LLAMA_3_8B, max_position_embeddings=131072),
}


def main() -> None:
    """Prints one line of JSON; ``error`` is in it where no device was found."""
    options = parse_load_options("Devices and what would fit, as JSON.")
    try:
        first = pick_devices(options)[0]
    except (ValueError, RuntimeError) as error:
        print(json.dumps({"error": str(error)}))
        return
    devices = jax.devices(first.platform)
    print(json.dumps({"devices": [describe(d) for d in devices], "fits": fits(devices, options)}))


def describe(device: Device) -> dict[str, Any]:
    """One device; the memory of a CPU is the host's."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_bytes": (stats or {}).get("bytes_limit"),
        "free_bytes": free_bytes(device),
    }


def fits(devices: Sequence[Device], options: LoadOptions) -> list[dict[str, Any]]:
    """Every shape in both dtypes, that of the platform first, on one device and on all."""
    dtypes = ["float32", "bfloat16"]
    if devices[0].platform != "cpu":
        dtypes.reverse()
    return [
        {"model": name, "dtype": dtype, "num_devices": number}
        | fit(model, dtype, devices[:number], options)
        for name, model in SHAPES.items()
        for dtype in dtypes
        for number in sorted({1, len(devices)})
    ]


def fit(
    model: ModelConfig, dtype: str, devices: Sequence[Device], options: LoadOptions
) -> dict[str, Any]:
    """Bytes and tokens, by the arithmetic that a start uses; nothing is allocated.

    ``parameter_bytes`` are on each device, ``kv_token_bytes`` on all of them together.
    ``most_kv_tokens`` is what pages could have if nothing else needed memory, ``kv_tokens`` what a
    start without flags takes, None where it is refused, which ``refusal`` says.
    """
    mesh, dtypes = make_mesh(devices), DtypePolicy.for_platform(devices[0].platform, dtype)
    result: dict[str, Any] = dict.fromkeys(FIT_KEYS)
    try:
        parameters = parameter_bytes(model, dtypes, mesh)
        page = page_bytes(model, 128, dtypes.kv_cache, mesh) // 128
    except ValueError as error:  # heads that cannot be divided over so many devices
        return result | {"refusal": str(error)}
    result |= {"parameter_bytes": parameters, "kv_token_bytes": page}
    free = [size for device in devices if (size := free_bytes(device)) is not None]
    if free:
        result["most_kv_tokens"] = max(0, min(free) - parameters) * len(devices) // page
    try:
        config = engine_config(options, model, dtypes, mesh)
    except ValueError as error:
        return result | {"refusal": str(error)}
    return result | {"kv_tokens": config.num_pages * config.page_size}


if __name__ == "__main__":
    main()
