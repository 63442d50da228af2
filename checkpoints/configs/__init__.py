"""Configurations of public models, without weights: enough to compile and to plan memory.

The figures are those of each model's own ``config.json`` at huggingface.co
(meta-llama/Meta-Llama-3-8B, meta-llama/Meta-Llama-3-70B, meta-llama/Llama-3.2-1B,
Qwen/Qwen2.5-Coder-1.5B, Qwen/Qwen3-30B-A3B, HuggingFaceTB/SmolLM2-135M-Instruct), as far as they
shape the programs.
"""

import json
from importlib import resources

from jaxinfer.config import ModelConfig
from jaxinfer.models import read_config


def configured_models() -> list[str]:
    """Names of the models whose configuration is shipped."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def model_config(name: str) -> ModelConfig:
    """The configuration shipped under ``name``. Raises ``ValueError`` listing those that are."""
    names = configured_models()
    if name not in names:
        raise ValueError(f"no configuration is called {name!r}; there are {', '.join(names)}")
    text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    return read_config(json.loads(text))
