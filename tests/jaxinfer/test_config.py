"""Values that cannot be: refused with the name, the value and the limit."""

from typing import Any

import pytest

from jaxinfer.config import DtypePolicy, EngineConfig, RopeScaling
from tests.jaxinfer.tiny import tiny_model


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 0}, r"vocab_size .* 0"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers .* -1"),
        ({"num_attention_heads": 5}, r"num_attention_heads \(5\).*num_key_value_heads \(2\)"),
        ({"head_dim": 7}, r"head_dim .* 7"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps .* 0"),
        ({"rope_theta": float("nan")}, r"rope_theta .* nan"),
        ({"rope_scaling": RopeScaling(kind="factors", factors=(1.0,))}, r"1 factors.*need 4"),
    ],
)
def test_impossible_models(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_model(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_num_seqs": 0}, r"max_num_seqs .* 0"),
        ({"max_num_seqs": 1025}, r"max_num_seqs .*1024.* 1025"),
        ({"max_num_batched_tokens": 63}, r"max_num_batched_tokens .*64.* 63"),
        ({"max_num_batched_tokens": 100}, r"max_num_batched_tokens .* multiple of 64 .* 100"),
        ({"page_size": 0}, r"page_size .* 0"),
        ({"num_pages": 127}, r"2032 tokens, fewer than max_model_len \(2048\)"),
        ({"max_model_len": 1}, r"max_model_len .* 1"),
    ],
)
def test_impossible_engines(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EngineConfig(**changes)


def test_dtypes_follow_the_platform() -> None:
    assert DtypePolicy.for_platform("cpu").weights == "float32"
    assert DtypePolicy.for_platform("tpu").kv_cache == "bfloat16"
    assert DtypePolicy.for_platform("gpu", "float32").activations == "float32"
    assert DtypePolicy.for_platform("tpu").logits == "float32"
    with pytest.raises(ValueError, match="int8"):
        DtypePolicy.for_platform("cpu", "int8")
