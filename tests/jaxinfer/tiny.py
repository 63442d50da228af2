"""Small random models and engines for tests."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxinfer import models
from jaxinfer.batch import BatchShape
from jaxinfer.config import DraftModel, DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sharding import make_mesh

CPU_DTYPES = DtypePolicy.for_platform("cpu")


def tiny_model(**changes: Any) -> ModelConfig:
    """Two layers, 3 query heads a kv head, a vocabulary of 96.

    Not tied: a random model with tied embeddings only ever repeats its input.
    """
    values: dict[str, Any] = {
        "architecture": "llama",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return ModelConfig(**(values | changes))


def tiny_config(**changes: Any) -> EngineConfig:
    """Room for 8 sequences of 128 tokens, steps of at most 4 tiles of 16 rows."""
    values: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "page_size": 8,
        "num_pages": 128,
        "chunk_tile": 16,
    }
    return EngineConfig(**(values | changes))


def tiny_spec(
    config: EngineConfig | None = None,
    model: ModelConfig | None = None,
    dtypes: DtypePolicy = CPU_DTYPES,
    draft: DraftModel | None = None,
) -> EngineSpec:
    """A tiny model, or another one, on one CPU device."""
    mesh = make_mesh(jax.devices("cpu")[:1])
    return EngineSpec(model or tiny_model(), config or tiny_config(), dtypes, mesh, draft)


def random_parameters(model: ModelConfig, seed: int = 0) -> dict[Any, Any]:
    """Parameters drawn by the model's own declarations, the head widened for clear logits."""
    state = nnx.state(models.build(model, CPU_DTYPES, nnx.Rngs(seed)))
    parameters = nnx.to_pure_dict(state)
    parameters["lm_head"] = parameters["lm_head"] * 3
    return parameters


def make_engine(
    config: EngineConfig | None = None,
    model: ModelConfig | None = None,
    seed: int = 0,
    pick_shapes: Callable[[Engine], list[BatchShape]] | None = None,
) -> Engine:
    """A compiled and started engine on one CPU device, of all shapes or of those picked."""
    model = model or tiny_model()
    engine = Engine(tiny_spec(config, model))
    engine.compile(shapes=pick_shapes and pick_shapes(engine))
    engine.start(jax.device_put(random_parameters(model, seed)))
    return engine


def largest_shape(engine: Engine) -> list[BatchShape]:
    """Returns the one plain shape that has room for every step without drafts."""
    return [shape for shape in engine.shapes if not shape.num_drafts][-1:]


def few_shapes(engine: Engine) -> list[BatchShape]:
    """Returns shapes that have room for every step, and take a third of the time to compile.

    They are the largest plain one, and of those with drafts the largest; where calls have several
    steps, the largest without tiles too, which alone has more than one.
    """
    alone = [shape for shape in engine.shapes if shape.num_drafts and not shape.num_tiles]
    several = alone[-1:] if engine.spec.config.max_steps_per_call > 1 else []
    return [*largest_shape(engine), *several, engine.shapes[-1]]


def random_request(name: str, length: int, max_tokens: int, seed: int, **sampling: Any) -> Request:
    """A request of random tokens of the tiny vocabulary."""
    tokens = np.random.RandomState(seed).randint(0, 96, length)
    return Request(
        request_id=name,
        prompt_token_ids=tuple(int(token) for token in tokens),
        max_tokens=max_tokens,
        sampling=SamplingParams(seed=seed, **sampling),
        ignore_eos=True,
    )


def run_all(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """Adds all requests and steps until they are finished."""
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
    return outputs
