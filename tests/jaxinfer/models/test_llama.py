"""Llama against transformers: small random models, and the default model's real weights.

The numbers were made by tests/data/make_llama_reference.py; see there.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from checkpoints.fetch.catalog import resolve
from checkpoints.load import load_parameters, open_checkpoint
from jaxinfer import models
from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig, RopeScaling
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.models.rotary import inverse_frequencies
from jaxinfer.request import Request
from jaxinfer.schedule import TokenLogprobs
from jaxinfer.sharding import abstract_parameters, make_mesh
from serving.text.tokenizer import Tokenizer
from tests.checkpoints.floats import FloatTensors
from tests.data.random_llama import draw_weights
from tests.jaxinfer.logits import prompt_logits
from tests.jaxinfer.tiny import CPU_DTYPES, run_all, tiny_config, tiny_model, tiny_spec
from tests.thorough import thorough_beyond

DATA = Path(__file__).parents[2] / "data"
CASES = json.loads((DATA / "llama_reference.json").read_text())["cases"]


@dataclass(frozen=True)
class RandomLlama(FloatTensors):
    """Weights drawn by name."""

    model: ModelConfig
    weights: dict[str, np.ndarray]

    def tensor(self, name: str) -> np.ndarray:
        return self.weights[name]


def model_config(config: dict[str, Any]) -> ModelConfig:
    """From the fields of a Hugging Face config.json."""
    fields = dict(config)
    scaling = fields.pop("rope_scaling")
    if scaling:
        scaling = dict(scaling)
        scaling = RopeScaling(kind=scaling.pop("rope_type"), **scaling)
    return ModelConfig(architecture="llama", rope_scaling=scaling, **fields)


def parameters_of(case: dict[str, Any]) -> tuple[ModelConfig, dict[Any, Any]]:
    model = model_config(case["config"])
    _, state = models.abstract(model, CPU_DTYPES)
    abstract = abstract_parameters(state, make_mesh(jax.devices("cpu")[:1]))
    weights = RandomLlama(model, draw_weights(case["config"], case["seed"]))
    return model, load_parameters(weights, abstract)


@pytest.mark.parametrize(
    "name", thorough_beyond(["grouped_tied", "llama3_rope"], CASES, "more cases of the families")
)
def test_logits_equal_transformers(name: str) -> None:
    case = CASES[name]
    model, parameters = parameters_of(case)
    logits = prompt_logits(model, parameters, case["input_ids"], tiny_config())
    for position, wanted in case["logits"].items():
        largest = np.abs(wanted).max()
        assert np.abs(logits[int(position)] - wanted).max() <= 1e-4 * largest, position


@pytest.mark.parametrize(
    "name",
    thorough_beyond(["grouped_tied"], CASES, "more cases of the families"),
)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    case = CASES[name]
    model, parameters = parameters_of(case)
    config = tiny_config(max_num_batched_tokens=16)
    engine = Engine(tiny_spec(config, model))
    engine.compile(shapes=engine.shapes[-1:])  # one is enough, and takes less time
    engine.start(parameters)
    request = Request("a", tuple(case["input_ids"]), len(case["greedy_ids"]), ignore_eos=True)
    tokens = run_all(engine, [request])["a"]
    clear = clear_steps(case["greedy_gaps"], 1e-3)
    assert tokens[:clear] == case["greedy_ids"][:clear]
    assert clear == len(tokens), "the reference was drawn so that no step is a near tie"


def clear_steps(gaps: list[float], least: float) -> int:
    """Steps before the first whose best two logits are closer than ``least``."""
    return next((step for step, gap in enumerate(gaps) if gap <= least), len(gaps))


def test_rope_factors_equal_the_rule_they_were_made_by() -> None:
    """GGUF stores an evaluated llama3 rule as divisors of the frequencies."""
    rule = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
    plain, scaled = tiny_model(head_dim=16), tiny_model(head_dim=16, rope_scaling=rule)
    divisors = inverse_frequencies(plain)[0] / inverse_frequencies(scaled)[0]
    assert divisors.min() == 1
    assert divisors.max() == pytest.approx(8)
    stored = RopeScaling(kind="factors", factors=tuple(float(x) for x in divisors))
    np.testing.assert_allclose(
        inverse_frequencies(tiny_model(head_dim=16, rope_scaling=stored))[0],
        inverse_frequencies(scaled)[0],
        rtol=1e-6,
    )


def test_unknown_architecture_lists_what_is_supported() -> None:
    with pytest.raises(ValueError, match=r"'rwkv' is not supported; supported: .*llama"):
        models.abstract(tiny_model(architecture="rwkv"), CPU_DTYPES)


def test_parameters_declare_what_the_platform_asks_for() -> None:
    """bfloat16 weights, float32 norms; every array is placed by its logical axes."""
    dtypes = DtypePolicy.for_platform("tpu")
    _, state = models.abstract(tiny_model(), dtypes)
    placed = abstract_parameters(state, make_mesh(jax.devices("cpu")[:1]))
    layer = placed["layers"][0]
    assert layer["attention"]["qkv"].dtype == "bfloat16"
    assert layer["input_norm"].dtype == "float32"
    assert layer["attention"]["qkv"].sharding.spec == P(None, "tensor", None, None)
    assert layer["attention"]["o_proj"].sharding.spec == P("tensor", None, None, None)
    assert layer["mlp"]["gate_up"].sharding.spec == P(None, None, "tensor")
    assert placed["embed_tokens"].sharding.spec == P("tensor", None)
    assert placed["lm_head"].sharding.spec == P(None, "tensor")


@functools.cache
def default_model() -> tuple[Engine, Tokenizer]:
    """The default model's real weights in a compiled engine."""
    checkpoint = open_checkpoint(resolve("smollm2-135m-instruct"))
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64)
    mesh = make_mesh(jax.devices("cpu")[:1])
    engine = Engine(EngineSpec(checkpoint.model, config, CPU_DTYPES, mesh))
    engine.compile(shapes=engine.shapes[-1:])  # one is enough, and takes less time
    engine.start(load_parameters(checkpoint, engine.abstract_parameters))
    return engine, Tokenizer(checkpoint.tokenizer)


PROMPTS = json.loads((DATA / "smollm2_f32.json").read_text())["prompts"]


@pytest.mark.model
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt["name"])
def test_real_prompt_ids(prompt: dict[str, Any]) -> None:
    _, tokenizer = default_model()
    if prompt["kind"] == "raw":
        assert tokenizer.encode(prompt["text"]) == prompt["prompt_ids"]
    else:
        assert tokenizer.encode_chat(prompt["messages"]) == prompt["prompt_ids"]


@pytest.mark.model
def test_real_greedy_tokens() -> None:
    """All prompts in one batch, 64 tokens through end-of-sequence, text included."""
    engine, tokenizer = default_model()
    outputs = run_all(
        engine,
        [
            Request(prompt["name"], tuple(prompt["prompt_ids"]), 64, ignore_eos=True)
            for prompt in PROMPTS
        ],
    )
    for prompt in PROMPTS:
        clear = clear_steps(prompt["greedy_top1_minus_top2"], 1e-2)
        tokens = outputs[prompt["name"]]
        assert tokens[:clear] == prompt["greedy_ids"][:clear], prompt["name"]
        if tokens == prompt["greedy_ids"]:
            assert tokenizer.decode(tokens, skip_control_tokens=False) == prompt["greedy_text"]


@pytest.mark.model
@pytest.mark.thorough("more of the default model")
def test_real_top_logits() -> None:
    engine, _ = default_model()
    parameters = engine._parameters
    assert parameters is not None
    for prompt in PROMPTS:
        config = EngineConfig(max_num_seqs=1, max_model_len=256, num_pages=16)
        logits = prompt_logits(engine.spec.model, parameters.target, prompt["prompt_ids"], config)[
            -1
        ]
        top = np.argsort(-logits)[:5]
        assert top.tolist() == prompt["top5_ids"]
        np.testing.assert_allclose(logits[top], prompt["top5_logits"], atol=2e-3, rtol=0)
        logsumexp = np.log(np.exp(logits.astype(np.float64)).sum())
        assert logsumexp == pytest.approx(prompt["logsumexp"], abs=2e-3)


@pytest.mark.model
@pytest.mark.thorough("more of the default model")
def test_real_likelihood_of_a_text() -> None:
    """2,000 tokens in one window, no BOS: within 0.1 % of transformers, token by token close."""
    engine, tokenizer = default_model()
    reference = json.loads((DATA / "nll_pytopics.json").read_text())
    token_ids = tokenizer.encode(reference["text"], add_special_tokens=False)[:2000]
    assert token_ids == reference["ids"]
    engine.add(Request("text", tuple(token_ids), max_tokens=1, prompt_logprobs=0))
    scored: tuple[TokenLogprobs | None, ...] = ()
    while engine.has_unfinished:
        for output in engine.step():
            scored += output.prompt_logprobs
    losses = np.array([-entry.logprob for entry in scored if entry])
    assert len(losses) == 1999
    assert losses.mean() == pytest.approx(reference["mean_nll"], rel=1e-3)
    np.testing.assert_allclose(losses, reference["token_nll"], atol=5e-3)
