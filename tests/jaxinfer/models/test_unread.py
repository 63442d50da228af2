"""Fields of a config.json that no module computes are refused by name, others are not looked at."""

import math
from typing import Any

import pytest

from jaxinfer.config import ModelConfig
from jaxinfer.models import read_config
from tests.jaxinfer.models.random_checkpoint import CASES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def read(case: str, **changes: Any) -> ModelConfig:
    """A family's case with further fields, or others in their place."""
    config = CASES.get(case, CASES["mistral_window_5"])["config"] | {"sliding_window": None}
    own = {"model_type": case} if case not in CASES else {}
    return read_config(config | own | changes)


@pytest.mark.parametrize(
    ("case", "changes", "match"),
    [
        ("llama", {"logit_scale": 0.25}, r"logit_scale is 0\.25; only 1 is supported"),
        ("llama", {"residual_multiplier": 0.22}, r"residual_multiplier is 0\.22"),
        ("llama", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0, which is"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"layer_types": ["sliding_attention"]}, "layer_types is "),
        ("mistral", {"attention_bias": True}, "attention_bias is True, which is not"),
        ("mistral", {"clip_qkv": 8.0}, r"clip_qkv is 8\.0, which is not supported"),
        ("qwen2", {"is_causal": False}, "is_causal is False; only True is supported"),
        ("qwen2", {"use_qk_norm": True}, "use_qk_norm is True, which is not supported"),
        ("qwen3", {"norm_type": "layer_norm"}, "norm_type is 'layer_norm'; only"),
        ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts is 1, which is not"),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4}, "num_local_experts is 4; only"),
        ("qwen3", {"rope_scaling": {**YARN, "ext": 2}}, "rope_scaling.ext is 2, which is not"),
        (
            "qwen3",
            {"rope_scaling": {"type": "default", "mrope_section": [8, 8]}},
            r"rope_scaling\.mrope_section is \[8, 8\], which is not supported",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.5}},
            "attention_factor is 1.5, which is not",
        ),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "mscale": 0.7},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                }
            },
            "rope_parameters.full_attention.mscale is 0.7, which is not",
        ),
        ("gemma3", {"attention_multiplier": 0.5}, r"attention_multiplier is 0\.5"),
    ],
)
def test_what_is_not_computed(case: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read(case, **changes)


def test_a_text_config_is_looked_at_too() -> None:
    text = CASES["gemma3"]["config"] | {"residual_multiplier": 0.5}
    with pytest.raises(ValueError, match=r"text_config\.residual_multiplier is 0\.5"):
        read_config({"model_type": "gemma3", "text_config": text})


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
def test_what_changes_nothing(case: str) -> None:
    neutral = {
        "logit_scale": 1.0,
        "residual_multiplier": 1,
        "is_causal": True,
        "clip_qkv": None,
        "qk_norm": False,
        "moe_layer_freq": 1,
        "n_shared_experts": 0,
        "initializer_range": 0.02,
        "attention_dropout": 0.1,
        "_name_or_path": "x",
        "auto_map": {"AutoConfig": "configuration.Config"},
        "something_new": [1],
    }
    assert read(case, **neutral) == read(case)


def test_two_scales_of_yarn() -> None:
    """Their ratio, as DeepSeek's files mean them; one alone is not looked at."""

    def factor(**scales: float) -> float:
        scaling = read("qwen2", rope_scaling=YARN | scales).rope_scaling
        assert scaling
        return scaling.attention_factor

    plain = 0.1 * math.log(4) + 1
    assert factor() == factor(mscale=0.5) == factor(mscale_all_dim=0.5) == pytest.approx(plain)
    expected = plain / (0.05 * math.log(4) + 1)
    assert factor(mscale=1.0, mscale_all_dim=0.5) == pytest.approx(expected)
    assert factor(mscale=1.0, mscale_all_dim=0.5, attention_factor=1.2) == 1.2
