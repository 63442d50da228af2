"""GGUF files of every family, as gguf-py writes them, against the tensors they were made of."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from checkpoints.gguf.checkpoint import GGUFCheckpoint
from jaxinfer.config import ModelConfig
from tests.checkpoints.gguf.family_gguf import ARCHITECTURES, kind_of, write_gguf
from tests.jaxinfer.models.random_checkpoint import CASES, RandomCheckpoint

# Qwen's keys have no windows.
IN_GGUF = [case for case in CASES if case not in ("qwen2_windows", "qwen3_moe_window")]


def as_gguf_says(model: ModelConfig) -> ModelConfig:
    """``model`` without what a GGUF file of its architecture leaves out, numbers in float32."""
    changes: dict[str, Any] = {"rms_norm_eps": np.float32(model.rms_norm_eps).item()}
    if ARCHITECTURES[model.architecture] == "llama":
        changes["sliding_window"] = None
        changes["architecture"] = "mixtral" if model.num_experts else "llama"
    if model.architecture == "qwen3_moe":
        changes["norm_topk_prob"] = True
    if model.architecture == "gemma3_text":
        # Every sixth layer is global, and scores are divided by the root of the head's size.
        changes["layer_types"] = ("sliding_attention",) * model.num_hidden_layers
        changes["query_pre_attn_scalar"] = model.head_dim
    if scaling := model.rope_scaling:
        # Yarn's attention factor is its paper's.
        grown = 0.1 * math.log(4) + 1 if scaling.kind == "yarn" else scaling.attention_factor
        changes["rope_scaling"] = dataclasses.replace(
            scaling,
            factors=tuple(np.float32(x).item() for x in scaling.factors),
            short_factors=tuple(np.float32(x).item() for x in scaling.short_factors),
            attention_factor=pytest.approx(grown, rel=1e-7),
        )
    return dataclasses.replace(model, **changes)


@pytest.mark.parametrize("case", IN_GGUF)
def test_model(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, case, gguf.GGMLQuantizationType.F32)
    assert GGUFCheckpoint(path).model == as_gguf_says(RandomCheckpoint(case).model)


@pytest.mark.parametrize("case", IN_GGUF)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_every_tensor(tmp_path: Path, case: str, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    path = tmp_path / "a.gguf"
    write_gguf(path, case, number)
    source, checkpoint = RandomCheckpoint(case), GGUFCheckpoint(path)
    for name in source.places:
        expected = source.tensor(name)
        own = kind_of(expected, number)
        expected = gguf.quants.dequantize(gguf.quants.quantize(expected, own), own)
        np.testing.assert_array_equal(checkpoint.tensor(name), expected, err_msg=name)
