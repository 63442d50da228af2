"""Settings of an architecture: computed, harmless, or refused by name, never ignored."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from checkpoints.gguf.checkpoint import GGUFCheckpoint
from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.models.rotary import inverse_frequencies
from tests.checkpoints.gguf import tiny_gguf
from tests.checkpoints.gguf.family_gguf import write_gguf
from tests.checkpoints.gguf.tiny_gguf import (
    ARRAY,
    BOOL,
    CONFIG,
    F32,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    file_bytes,
    llama_bytes,
    llama_metadata,
    llama_tensors,
)
from tests.data.random_llama import draw_weights

YARN = {
    "rope.scaling.type": (STRING, "yarn"),
    "rope.scaling.factor": (FLOAT32, 4.0),
    "rope.scaling.original_context_length": (UINT32, 32),
}


def read(folder: Path, settings: dict[str, tuple[int, Any]]) -> ModelConfig:
    """The model of a tiny Llama with these keys behind "llama."."""
    path = folder / "a.gguf"
    keys = {f"llama.{name}".replace(".", "__"): value for name, value in settings.items()}
    path.write_bytes(llama_bytes(F32, **keys))
    return GGUFCheckpoint(path).model


def test_betas_of_yarn(tmp_path: Path) -> None:
    plain = read(tmp_path, YARN)
    betas = {
        "rope.scaling.yarn_beta_fast": (FLOAT32, 2.0),
        "rope.scaling.yarn_beta_slow": (FLOAT32, 0.0625),
    }
    model = read(tmp_path, YARN | betas)
    scaling = model.rope_scaling
    assert scaling
    assert (scaling.beta_fast, scaling.beta_slow) == (2.0, 0.0625)
    assert not np.array_equal(inverse_frequencies(model)[0], inverse_frequencies(plain)[0])
    # Without yarn nothing follows from them.
    assert read(tmp_path, betas).rope_scaling is None


def test_an_attention_factor_is_on_top_of_what_the_rule_has(tmp_path: Path) -> None:
    factor = {"rope.scaling.attn_factor": (FLOAT32, 1.5)}
    assert inverse_frequencies(read(tmp_path, YARN | factor))[1] == pytest.approx(
        1.5 * (0.1 * math.log(4) + 1)
    )
    linear = {"rope.scaling.factor": (FLOAT32, 2.0)}
    expected = RopeScaling("linear", factor=2.0, attention_factor=1.5)
    assert read(tmp_path, linear | factor).rope_scaling == expected
    assert inverse_frequencies(read(tmp_path, factor))[1] == 1.5
    tensors = llama_tensors(draw_weights(CONFIG, seed=3))
    tensors.append(tiny_gguf.tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)))
    path = tmp_path / "factors.gguf"
    metadata = llama_metadata() | {"llama.rope.scaling.attn_factor": (FLOAT32, 1.5)}
    path.write_bytes(file_bytes(metadata, tensors))
    assert inverse_frequencies(GGUFCheckpoint(path).model)[1] == 1.5


def test_the_key_of_old_for_a_linear_factor(tmp_path: Path) -> None:
    old, new = "rope.scale_linear", "rope.scaling.factor"
    assert read(tmp_path, {old: (FLOAT32, 4.0)}).rope_scaling == RopeScaling("linear", factor=4.0)
    both = read(tmp_path, {old: (FLOAT32, 4.0), new: (FLOAT32, 4.0)})
    assert both.rope_scaling == RopeScaling("linear", factor=4.0)
    with pytest.raises(ValueError, match=r"llama.rope.scale_linear is 2; only 4 or 0"):
        read(tmp_path, {old: (FLOAT32, 2.0), new: (FLOAT32, 4.0)})


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("attention.causal", (BOOL, False), "llama.attention.causal is False, which is not"),
        ("logit_scale", (FLOAT32, 0.25), "llama.logit_scale is 0.25, which is not"),
        ("residual_scale", (FLOAT32, 2.0), "residual_scale is 2.0"),
        ("embedding_scale", (FLOAT32, 12.0), "embedding_scale is 12.0"),
        ("attention.scale", (FLOAT32, 0.5), "attention.scale is 0.5; only 0 or 0.25 is"),
        ("attention.clamp_kqv", (FLOAT32, 8.0), "attention.clamp_kqv is 8.0"),
        ("attention.max_alibi_bias", (FLOAT32, 8.0), "max_alibi_bias is 8.0"),
        ("attention.sliding_window", (UINT32, 64), "sliding_window is 64, .* a llama model"),
        ("attention.key_length_swa", (UINT32, 8), "key_length_swa is 8; only 16"),
        ("attention.temperature_scale", (FLOAT32, 0.1), "temperature_scale is 0.1"),
        ("attn_logit_softcapping", (FLOAT32, 50.0), "attn_logit_softcapping is 50.0"),
        ("final_logit_softcapping", (FLOAT32, 30.0), "final_logit_softcapping is 30.0"),
        ("rope.freq_base_swa", (FLOAT32, 1e4), "rope.freq_base_swa is 10000.0"),
        ("rope.dimension_sections", (ARRAY, (INT32, [8, 8])), "sections is an array of 2"),
        ("rope.scaling.alpha", (FLOAT32, 1000.0), "alpha is 1000.0"),
        ("rope.scaling.attn_factor", (FLOAT32, 0.0), "attn_factor must be positive, got 0"),
        ("rope.scaling.type", (STRING, "longrope"), "'rope_factors_long.weight' is missing"),
        ("rope.scaling.yarn_attn_factor", (FLOAT32, 0.0), "yarn_attn_factor is 0.0"),
        ("rope.scaling.yarn_ext_factor", (FLOAT32, 1.0), "yarn_ext_factor is 1; only -1 or 0"),
        ("rope.scaling.yarn_log_multiplier", (FLOAT32, 0.1), "yarn_log_multiplier is 0.1"),
        ("use_parallel_residual", (BOOL, True), "use_parallel_residual is True"),
        ("expert_used_count", (UINT32, 2), "expert_used_count is 2"),
        ("something.new", (STRING, "x" * 99), "llama.something.new is 'x{59}, which is not"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    tmp_path: Path, name: str, value: tuple[int, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        read(tmp_path, {name: value})


def test_yarn_without_its_own_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="yarn_ext_factor is 0; only -1 or 1"):
        read(tmp_path, YARN | {"rope.scaling.yarn_ext_factor": (FLOAT32, 0.0)})
    with pytest.raises(ValueError, match="beta_fast must be a positive number"):
        read(tmp_path, YARN | {"rope.scaling.yarn_beta_fast": (FLOAT32, -2.0)})


def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    settings = {
        "vocab_size": (UINT32, 32000),
        "tensor_data_layout": (STRING, "Meta AI original pth"),
        "pooling_type": (UINT32, 3),
        "attention.causal": (BOOL, True),
        "attention.scale": (FLOAT32, 0.25),
        "attention.key_length_swa": (UINT32, 16),
        "attention.sliding_window": (UINT32, 4096),
        "attention.clamp_kqv": (FLOAT32, 0.0),
        "attention.sliding_window_pattern": (ARRAY, (BOOL, [False, False])),
        "embedding_length_out": (UINT32, 64),
        "expert_count": (UINT32, 0),
        "expert_used_count": (UINT32, 0),
        "logit_scale": (FLOAT32, 1.0),
        "rope.scaling.attn_factor": (FLOAT32, 1.0),
        "rope.scaling.finetuned": (BOOL, True),
        "rope.scaling.yarn_ext_factor": (FLOAT32, -1.0),
        "rope.scaling.yarn_attn_factor": (FLOAT32, 1.0),
        "rope.scaling.yarn_log_multiplier": (FLOAT32, 0.0),
        "use_parallel_residual": (BOOL, False),
    }
    assert read(tmp_path, settings) == read(tmp_path, {})


class TestGemma:
    """Settings that Gemma 3 alone has."""

    @staticmethod
    def read(folder: Path, settings: dict[str, Any]) -> ModelConfig:
        path = folder / "gemma.gguf"
        write_gguf(path, "gemma3", gguf.GGMLQuantizationType.F32, settings=settings)
        return GGUFCheckpoint(path).model

    def test_a_pattern_of_windows(self, tmp_path: Path) -> None:
        name = "attention.sliding_window_pattern"
        local, everything = "sliding_attention", "full_attention"
        layers = self.read(tmp_path, {}).num_hidden_layers
        expected = tuple((local, everything)[i % 2] for i in range(layers))
        assert self.read(tmp_path, {name: 2}).layer_types == expected
        listed = [kind == local for kind in expected]
        assert self.read(tmp_path, {name: listed}).layer_types == expected
        with pytest.raises(ValueError, match="layer_types has 1 entries"):
            self.read(tmp_path, {name: [True]})

    def test_caps(self, tmp_path: Path) -> None:
        self.read(tmp_path, {"final_logit_softcapping": 0.0})
        with pytest.raises(ValueError, match=r"final_logit_softcapping is 30\.0"):
            self.read(tmp_path, {"final_logit_softcapping": 30.0})

    def test_an_attention_factor(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"attn_factor is 1\.5; only 1 .* local layers"):
            self.read(tmp_path, {"rope.scaling.attn_factor": 1.5})
