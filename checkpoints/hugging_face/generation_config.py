"""How a Hugging Face folder wants its model sampled: generation_config.json."""

import dataclasses
from pathlib import Path
from typing import Any

from checkpoints.json_file import read_json
from jaxinfer.request import SamplingParams

GENERATION_CONFIG = "generation_config.json"
MAX_GENERATION_CONFIG_BYTES = 1 << 20

_SAMPLED = ("temperature", "top_k", "top_p", "min_p")


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
    names = ["repetition_penalty"]
    sampling = SamplingParams()
    if fields.get("do_sample") is True:
        sampling = SamplingParams(temperature=1.0)
        names += _SAMPLED
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
