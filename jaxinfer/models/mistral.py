"""Mistral's dense models: a Llama whose layers may see only a window (Jiang et al. 2023).

A GGUF file says "llama" and leaves the window out, as llama.cpp does.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.models.family import Family
from jaxinfer.models.fields import Fields, common_fields, window_fields
from jaxinfer.models.llama import Llama


def read_config(fields: Fields) -> ModelConfig:
    """A Mistral; a window that is null is none, and one that nobody speaks of is of 4,096."""
    if not fields.is_null("sliding_window"):
        fields = fields.with_defaults({"sliding_window": 4096})
    common = common_fields(fields)
    return ModelConfig(**common, **window_fields(fields, common["num_hidden_layers"]))


FAMILY = Family(Llama, read_config)
