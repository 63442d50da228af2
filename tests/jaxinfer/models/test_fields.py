"""Fields of a config.json: what cannot be, and what they mean where several speak of one thing.

What is expected here was found by running transformers 5.23 on such files.
"""

from typing import Any

import pytest

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.models import read_config
from jaxinfer.models.fields import Fields
from tests.jaxinfer.models.random_checkpoint import CASES

LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 30000.0}
LONG = {
    "rope_type": "longrope",
    "long_factor": [2.0] * 8,
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 64,
}


def read(case: str, *absent: str, **changes: Any) -> ModelConfig:
    """A family's case with fields left out and others in their place."""
    fields = {name: value for name, value in CASES[case]["config"].items() if name not in absent}
    return read_config(fields | changes)


@pytest.mark.parametrize(
    "value", [10**400, 1e16, 1e-320, float("inf"), float("nan"), 0, -1, True, "1", None]
)
def test_numbers_that_are_refused(value: Any) -> None:
    """A whole number may be finite and yet beyond every float."""
    with pytest.raises(ValueError, match=r"x (must be a positive number|is missing)"):
        Fields({"x": value}).number("x")
    with pytest.raises(ValueError, match="x must be at most 4096 positive numbers"):
        Fields({"x": [value]}).numbers("x")


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 5000.0}, 5000.0, None),
        ({"rope_parameters": DEFAULT, "rope_theta": 5000.0}, 30000.0, None),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5000.0}, 5000.0, None),
        ({"rope_parameters": LINEAR, "rope_theta": 5000.0}, 5000.0, RopeScaling("linear", 4.0)),
        (
            {"rope_parameters": DEFAULT, "rope_scaling": LINEAR, "rope_theta": 5000.0},
            5000.0,
            RopeScaling("linear", 4.0),
        ),
        ({}, 10000.0, None),
    ],
)
def test_which_of_several_ropes_counts(
    rope: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    model = read("qwen3", "rope_parameters", **rope)
    assert (model.rope_theta, model.rope_scaling) == (theta, scaling)


def test_ropes_that_do_not_turn() -> None:
    with pytest.raises(ValueError, match=r"rope_theta must be above 1, got 1\.0"):
        read("qwen3", "rope_parameters", rope_theta=1.0)


def test_swish_is_silu() -> None:
    assert read("qwen3", hidden_act="swish") == read("qwen3")
    with pytest.raises(ValueError, match="only 'silu' or 'swish' is supported"):
        read("qwen3", hidden_act="gelu")
    with pytest.raises(ValueError, match="only 'gelu_pytorch_tanh' is supported"):
        read("gemma3", hidden_activation="swish")


def test_a_context_at_the_top_goes_before_that_of_the_rope() -> None:
    model = read("phi3", rope_parameters=LONG, original_max_position_embeddings=32)
    assert model.rope_scaling is not None
    assert model.rope_scaling.original_max_position_embeddings == 32
    assert (
        model.rope_scaling
        == read(
            "phi3", rope_parameters={**LONG, "rope_type": "su"}, original_max_position_embeddings=32
        ).rope_scaling
    )


@pytest.mark.parametrize(
    ("context", "factor", "expected"), [(64, 4.0, 256), (80, 4.0, 256), (64, 1e14, 1 << 30)]
)
def test_yarn_stretches_the_context(context: int, factor: float, expected: int) -> None:
    """As Qwen's cards have it: max_position_embeddings stays what it was."""
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64}
    changes = {"max_position_embeddings": context, "rope_theta": 1e6}
    for case in ("qwen2", "qwen3"):
        model = read(case, "rope_parameters", rope_scaling=rope, **changes)
        assert model.max_position_embeddings == expected
    kinds = {"full_attention": {**rope, "rope_theta": 1e6}, "sliding_attention": DEFAULT}
    model = read("gemma3", rope_parameters=kinds, max_position_embeddings=context)
    assert model.max_position_embeddings == expected


def test_a_context_that_is_stretched_already() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    changes = {"max_position_embeddings": 512}
    yarn = read("qwen2", "rope_parameters", rope_scaling=rope, **changes)
    assert yarn.max_position_embeddings == 512
    linear = read("qwen2", "rope_parameters", rope_scaling=LINEAR, **changes)
    assert linear.max_position_embeddings == 512


def test_a_factor_on_top_of_yarns_own() -> None:
    """As DeepSeek-R1-0528-Qwen3-8B has it: it takes back what yarn does to scores."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"attn_factor": 0.8782488562869419}
    scaling = read("qwen3", "rope_parameters", rope_scaling=rope).rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(1.0, rel=1e-9)
    whole = read("qwen3", "rope_parameters", rope_scaling={**rope, "attention_factor": 1.5})
    assert whole.rope_scaling is not None
    assert whole.rope_scaling.attention_factor == 1.5


def test_a_factor_of_longrope_goes_before_the_ratio_of_contexts() -> None:
    plain = read("phi3", rope_parameters=LONG).rope_scaling
    given = read("phi3", rope_parameters={**LONG, "factor": 3.0}).rope_scaling
    assert plain is not None
    assert given is not None
    assert given.attention_factor != plain.attention_factor


def test_defaults_of_families() -> None:
    absent = ("rms_norm_eps", "rope_parameters", "head_dim", "sliding_window")
    mixtral, phi3, qwen3, experts = (
        read(case, *absent) for case in ("mixtral", "phi3", "qwen3", "qwen3_moe")
    )
    assert (mixtral.rms_norm_eps, mixtral.rope_theta) == (1e-5, 1e6)
    assert (phi3.rms_norm_eps, phi3.rope_theta) == (1e-5, 1e4)
    assert (qwen3.rms_norm_eps, qwen3.head_dim) == (1e-6, 128)
    assert experts.head_dim == experts.hidden_size // experts.num_attention_heads
    assert read("mistral_window_20", *absent).sliding_window == 4096
    assert read("mistral_window_20", sliding_window=None).sliding_window is None


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("mixtral", {"sliding_window": 8}),
        ("phi3", {"sliding_window": 8}),
        ("qwen3_moe_window", {}),
    ],
)
def test_layers_that_are_all_alike(case: str, changes: dict[str, Any]) -> None:
    """transformers does not look at layer_types there: what it would ignore is refused."""
    count = read(case).num_hidden_layers
    model = read(case, **changes, layer_types=["sliding_attention"] * count)
    assert [model.window(layer) for layer in range(count)] == [model.sliding_window] * count
    assert model.sliding_window is not None
    types = ["full_attention"] + ["sliding_attention"] * (count - 1)
    with pytest.raises(ValueError, match="layer_types is "):
        read(case, **changes, layer_types=types)


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "qwen3_moe"])
def test_windows_that_are_switched_off(case: str) -> None:
    count = read(case).num_hidden_layers
    off = {"use_sliding_window": False, "sliding_window": 4}
    model = read(case, **off, layer_types=["full_attention"] * count)
    assert model.sliding_window is None
    with pytest.raises(ValueError, match="layer_types has sliding_attention, but use"):
        read(case, **off, layer_types=["sliding_attention"] * count)
