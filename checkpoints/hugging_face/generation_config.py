"""Sampling that a Hugging Face folder asks for: generation_config.json."""

import dataclasses
from pathlib import Path
from typing import Any

from checkpoints.json_file import read_json
from jaxinfer.request import SAMPLING_OPTIONS, SamplingParams

GENERATION_CONFIG = "generation_config.json"
MAX_GENERATION_CONFIG_BYTES = 1 << 20


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The fields of the file, none where there is none. Raises ``ValueError`` for a damaged one."""
    path = folder / GENERATION_CONFIG
    return read_json(path, MAX_GENERATION_CONFIG_BYTES) if path.exists() else {}


def read_default_sampling(folder: Path) -> SamplingParams:
    """The sampling that the folder asks for; greedy unless it says ``do_sample``, as there.

    What a field leaves out is off, also where transformers has a default of its own (top_k 50).
    Raises ``ValueError`` for values that no request may have.
    """
    fields = read_generation_config(folder)
    is_sampled = fields.get("do_sample") is True
    sampling = SamplingParams(temperature=1.0) if is_sampled else SamplingParams()
    read = ("always", "sampled") if is_sampled else ("always",)
    names = [option.name for option in SAMPLING_OPTIONS if option.model_default in read]
    wanted = {name: fields[name] for name in names if fields.get(name) is not None}
    for name, value in wanted.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"{folder / GENERATION_CONFIG}: {name} must be a number, got {value!r:.40}"
            )
    try:
        return dataclasses.replace(sampling, **wanted)
    except ValueError as error:
        raise ValueError(f"{folder / GENERATION_CONFIG}: {error}") from error
