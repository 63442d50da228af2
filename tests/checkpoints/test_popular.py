"""Checkpoints that many people run, by every key of their files, rebuilt small: see popular.py."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from checkpoints.load import Checkpoint, load_parameters, open_checkpoint
from jaxinfer.config import AnyTokenizer
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sharding import make_mesh
from serving.text.tokenizer import Tokenizer
from tests.checkpoints.gguf.popular_gguf import write_popular_gguf
from tests.checkpoints.hugging_face.popular_folder import write_popular_folder
from tests.checkpoints.popular import CHECKPOINTS
from tests.checkpoints.stored import parameters_of
from tests.jaxinfer.tiny import CPU_DTYPES, run_all, tiny_config

# An engine takes seconds: none for those that differ in their files alone.
ANSWERED = [
    name
    for name in CHECKPOINTS
    if not name.endswith(("-saved-by-transformers-5", "-gguf", "qwen3-8b-awq"))
]
ANSWERED += ["gemma-3-1b-it-gguf", "llama-3.1-8b-instruct-gguf", "phi-4-mini-instruct-gguf"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Opens the checkpoint of a name, once."""

    @functools.cache
    def open_one(name: str) -> tuple[Checkpoint, Path]:
        folder = tmp_path_factory.mktemp(name)
        if "metadata" in CHECKPOINTS[name]:
            write_popular_gguf(path := folder / f"{name}.gguf", CHECKPOINTS[name])
        else:
            write_popular_folder(path := folder, CHECKPOINTS[name])
        return open_checkpoint(path), path

    return open_one


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_is_read(opened: Any, name: str) -> None:
    checkpoint, path = opened(name)
    expected = CHECKPOINTS[name]["expected"]
    for field, value in expected["model"].items():
        found = getattr(checkpoint.model, field)
        if isinstance(value, dict):
            found = {key: getattr(found, key) for key in value}
        assert _listed(found) == _near(value), field
    assert checkpoint.default_sampling == SamplingParams(**expected["sampling"])
    tokenizer: AnyTokenizer = checkpoint.tokenizer
    assert [tokenizer.tokens[i] for i in tokenizer.eos_token_ids] == expected["ends"]
    notes = [note.replace(f"{path}/", "").replace(f"{path}: ", "") for note in checkpoint.notes]
    assert notes == expected["notes"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_chats(opened: Any, name: str) -> None:
    """Prompts are the text, encoded so that special tokens are tokens; texts begin as they do."""
    checkpoint, _ = opened(name)
    spec, data = checkpoint.tokenizer, CHECKPOINTS[name]
    tokenizer = Tokenizer(spec, checkpoint.model.vocab_size)
    for chat in data["chats"]:
        arguments = chat.get("arguments", {})
        tools = chat.get("tools", ())
        given: dict[str, Any] = {"template_arguments": arguments, "tools": tools}
        assert tokenizer.render_chat(chat["messages"], **given) == chat["text"]
        token_ids = tokenizer.encode_chat(chat["messages"], **given)
        text = tokenizer.decode(token_ids, skip_control_tokens=False)
        assert text == chat.get("encoded", chat["text"])
        special = {spec.tokens[i] for i in spec.control_token_ids}
        written = {token for token in special if token in chat["text"]}
        assert written <= {spec.tokens[i] for i in token_ids}
    first = tokenizer.encode("a")[0]
    assert (spec.tokens[first] if first in spec.control_token_ids else "") == data["begins_with"]


def test_calls_that_a_template_leaves_out(opened: Any) -> None:
    checkpoint, _ = opened("smollm2-1.7b-instruct")
    messages = CHECKPOINTS["deepseek-r1-distill-qwen-1.5b"]["chats"][-1]["messages"]
    with pytest.raises(ValueError, match="the chat template leaves out an assistant's calls"):
        Tokenizer(checkpoint.tokenizer).render_chat(messages)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_parameter_is_loaded(opened: Any, name: str) -> None:
    checkpoint, _ = opened(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters_of(checkpoint, CPU_DTYPES)):
        assert np.isfinite(np.asarray(leaf)).all(), path


@pytest.mark.thorough("popular checkpoints")
@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer(opened: Any, name: str) -> None:
    checkpoint, _ = opened(name)
    model = checkpoint.model.served(512)
    tokenizer = Tokenizer(checkpoint.tokenizer, model.vocab_size)
    chat = CHECKPOINTS[name]["chats"][0]
    prompt = tokenizer.encode_chat(chat["messages"], template_arguments=chat.get("arguments"))
    config = tiny_config(max_model_len=512)
    engine = Engine(EngineSpec(model, config, CPU_DTYPES, make_mesh(jax.devices("cpu")[:1])))
    engine.compile(shapes=engine.shapes[-1:])
    engine.start(load_parameters(checkpoint, engine.abstract_parameters))
    request = Request("a", tuple(prompt), 4, ignore_eos=True)
    assert len(run_all(engine, [request])["a"]) == 4


def _listed(value: Any) -> Any:
    """The value as JSON would have it."""
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _near(value: Any) -> Any:
    """A value that equals its neighbours: numbers of GGUF files have 32 bits."""
    if isinstance(value, dict):
        return {key: _near(one) for key, one in value.items()}
    return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
