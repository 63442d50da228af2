from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.fetch.catalog import resolve
from checkpoints.gguf.checkpoint import GGUFCheckpoint
from jaxinfer.config import ModelConfig, RopeScaling, TokenizerSpec
from tests.checkpoints.gguf import tiny_gguf
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

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=12,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rms_norm_eps=float(np.float32(1e-5)),
    rope_theta=50000.0,
    tie_word_embeddings=True,
)


def open_bytes(tmp_path: Path, data: bytes) -> GGUFCheckpoint:
    path = tmp_path / "test.gguf"
    path.write_bytes(data)
    return GGUFCheckpoint(path)


def test_model_and_tokenizer(tmp_path: Path) -> None:
    checkpoint = open_bytes(tmp_path, llama_bytes())
    assert checkpoint.model == MODEL
    spec = checkpoint.tokenizer
    assert isinstance(spec, TokenizerSpec)
    assert spec.tokens[:5] == ("<|end|>", "<|start|>", "<tool>", "a", "b")
    assert spec.merges == ("a b", "ab c", "1 2")
    assert spec.pre_tokenizer == "smollm"
    assert spec.control_token_ids == (0, 1)
    assert spec.added_token_ids == (2,)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.add_bos_token) == (1, (0,), False)
    assert spec.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("name", "begins"), [("falcon3", True), ("llama-bpe", True), ("deepseek-r1-qwen", False)]
)
def test_prompts_begin_with_bos_by_the_name_of_the_split(
    tmp_path: Path, name: str, begins: bool
) -> None:
    keys = {"tokenizer__ggml__pre": (STRING, name), "tokenizer__ggml__add_bos_token": None}
    spec = open_bytes(tmp_path, llama_bytes(F32, **keys)).tokenizer
    assert isinstance(spec, TokenizerSpec)
    assert (spec.pre_tokenizer, spec.add_bos_token) == (name, begins)


def test_keys_of_samplers_are_named(tmp_path: Path) -> None:
    assert open_bytes(tmp_path, llama_bytes()).notes == ()
    keys = {"general__sampling__temp": (FLOAT32, 0.6), "general__sampling__top_k": (INT32, 20)}
    (note,) = open_bytes(tmp_path, llama_bytes(F32, **keys)).notes
    assert note.endswith("test.gguf: not read: general.sampling.temp, general.sampling.top_k")


def test_every_end_of_text_token_counts(tmp_path: Path) -> None:
    keys = {"tokenizer__ggml__eot_token_id": (UINT32, 1)}
    assert open_bytes(tmp_path, llama_bytes(F32, **keys)).tokenizer.eos_token_ids == (0, 1)
    keys = {"tokenizer__ggml__eot_token_id": (UINT32, 0)}
    assert open_bytes(tmp_path, llama_bytes(F32, **keys)).tokenizer.eos_token_ids == (0,)


def test_an_end_of_turn_that_no_key_names(tmp_path: Path) -> None:
    """Gemma 3's files say <eos>, their template <end_of_turn>; some have it as ordinary text."""
    tokens = ["<eos>", "<|start|>", "</s>", *"abc12", "<end_of_turn>", "<|eot_id|>", "Ġ", "<EOT>"]
    keys = {
        "tokenizer__ggml__tokens": (ARRAY, (STRING, tokens)),
        "tokenizer__ggml__token_type": (ARRAY, (INT32, [3, 3, 4] + [1] * 5 + [3, 4, 1, 1])),
        "tokenizer__ggml__merges": (ARRAY, (STRING, [])),
    }
    spec = open_bytes(tmp_path, llama_bytes(F32, **keys)).tokenizer
    assert spec.eos_token_ids == (0, 8, 9)
    assert (spec.control_token_ids, spec.added_token_ids) == ((0, 1, 8, 9), (2,))


def test_templates_and_what_they_call_tokens(tmp_path: Path) -> None:
    keys = {
        "tokenizer__chat_template__tool_use": (STRING, "{{ tools }}"),
        "tokenizer__ggml__padding_token_id": (UINT32, 2),
        "tokenizer__ggml__unknown_token_id": (UINT32, 99),  # is none
    }
    spec = open_bytes(tmp_path, llama_bytes(F32, **keys)).tokenizer
    assert spec.tool_template == "{{ tools }}"
    named = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<tool>"}
    assert dict(spec.template_tokens) == named


def test_tensors_come_back_in_the_order_of_hugging_face(tmp_path: Path) -> None:
    weights = draw_weights(CONFIG, seed=3)
    checkpoint = open_bytes(tmp_path, llama_bytes())
    for name, expected in weights.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), expected, name)
    with pytest.raises(ValueError, match=r"no tensor 'lm_head'"):
        checkpoint.tensor("lm_head")


def test_untied_head_and_wide_heads(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": False, "head_dim": 32}
    weights = draw_weights(config, seed=4)
    metadata = llama_metadata(config) | {"llama.attention.key_length": (UINT32, 32)}
    data = file_bytes(metadata, llama_tensors(weights, config))
    checkpoint = open_bytes(tmp_path, data)
    assert not checkpoint.model.tie_word_embeddings
    assert checkpoint.model.head_dim == 32
    for name, expected in weights.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), expected, name)


def test_rope_scaling(tmp_path: Path) -> None:
    linear = {
        "llama__rope__scaling__type": (STRING, "linear"),
        "llama__rope__scaling__factor": (FLOAT32, 4.0),
    }
    scaling = open_bytes(tmp_path, llama_bytes(F32, **linear)).model.rope_scaling
    assert scaling == RopeScaling("linear", factor=4.0)
    none = linear | {"llama__rope__scaling__type": (STRING, "none")}
    assert open_bytes(tmp_path, llama_bytes(F32, **none)).model.rope_scaling is None
    tensors = llama_tensors(draw_weights(CONFIG, seed=3))
    factors = np.arange(1, 9, dtype=np.float32)
    tensors.append(tiny_gguf.tensor("rope_freqs.weight", factors))
    scaling = open_bytes(tmp_path, file_bytes(llama_metadata(), tensors)).model.rope_scaling
    assert scaling == RopeScaling("factors", factors=tuple(factors.tolist()))
    tensors[-1] = tiny_gguf.tensor("rope_freqs.weight", factors[:-1])
    with pytest.raises(ValueError, match="7 factors, 16 rotated dimensions need 8"):
        open_bytes(tmp_path, file_bytes(llama_metadata(), tensors))
    tensors[-1] = tiny_gguf.tensor("rope_freqs.weight", factors - 1)
    with pytest.raises(ValueError, match="positive, finite"):
        open_bytes(tmp_path, file_bytes(llama_metadata(), tensors))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("general.architecture", (STRING, "gemma9"), "'gemma9' is not supported; .* llama"),
        ("general.architecture", None, "'general.architecture' is missing"),
        ("llama.block_count", None, "'llama.block_count' is missing"),
        ("llama.block_count", (UINT32, 1 << 31), "block_count is 2147483648, but the file"),
        ("llama.block_count", (UINT32, 0), r"num_hidden_layers must be .* \[1, .* got 0"),
        ("llama.block_count", (UINT32, 1), "9 tensors that a llama model does not have, 'blk.1"),
        ("llama.block_count", (UINT32, 3), r"tensor 'blk\.2\.\w+\.weight' is missing"),
        ("llama.embedding_length", (UINT32, 128), "has shape .*, the model needs"),
        ("llama.embedding_length", (STRING, "64"), "must be of type int, got str"),
        ("llama.attention.head_count", (UINT32, 0), r"head_count must be in \[1, 64\], got 0"),
        ("llama.attention.head_count", (ARRAY, (INT32, [4, 4])), "type int, got ndarray"),
        ("llama.attention.head_count_kv", (UINT32, 3), "must be a multiple"),
        (
            "llama.attention.head_count_kv",
            (INT32, -1),
            r"num_key_value_heads must be .* \[1, .* got -1",
        ),
        ("llama.attention.layer_norm_rms_epsilon", (FLOAT32, float("nan")), "must be finite"),
        ("llama.attention.layer_norm_rms_epsilon", (FLOAT32, 0.0), "must be a positive number"),
        ("llama.rope.freq_base", (FLOAT32, float("inf")), "must be finite"),
        ("llama.rope.dimension_count", (UINT32, 8), "rope.dimension_count is 8; only 16"),
        ("llama.rope.scaling.type", (STRING, "su"), "'su'; supported are none, linear, yarn"),
        ("llama.rope.scaling.factor", (FLOAT32, -2.0), "factor must be positive, got -2.0"),
        ("llama.expert_count", (UINT32, 8), "'llama.expert_used_count' is missing"),
        ("llama.context_length", (UINT32, 1 << 31), "context_length is 2147483648, more than"),
    ],
)
def test_models_that_are_refused(tmp_path: Path, key: str, value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        open_bytes(tmp_path, llama_bytes(F32, **{key.replace(".", "__"): value}))
    assert str(error.value).count("test.gguf") == 1


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("model", (STRING, "bert"), "'bert' is not supported; supported are gpt2 .* llama"),
        ("model", (STRING, "llama"), "tokenizer.ggml.scores must be 12 numbers"),
        ("model", None, "'tokenizer.ggml.model' is missing"),
        ("pre", None, "'tokenizer.ggml.pre' is missing"),
        ("tokens", (ARRAY, (INT32, [1])), "tokens' must be an array of strings"),
        ("tokens", (ARRAY, (STRING, ["a"] * 1037)), "1037 tokens, but the embedding has 12 rows$"),
        ("tokens", (ARRAY, (STRING, ["a"] * 13)), "token_type must be 13 numbers"),
        ("tokens", (ARRAY, (STRING, ["a"])), "token_type must be 1 numbers"),
        ("token_type", (STRING, "x" * 12), "token_type must be 12 numbers"),
        ("merges", None, "merges' must be an array of strings"),
        ("eos_token_id", (UINT32, 12), r"eos_token_id must be in \[0, 11\], got 12"),
        ("add_bos_token", (UINT32, 1), "must be of type bool, got int"),
        ("add_eos_token", (BOOL, True), "add_eos_token is True: prompts that end"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path: Path, key: str, value: Any, match: str) -> None:
    checkpoint = open_bytes(tmp_path, llama_bytes(F32, **{f"tokenizer__ggml__{key}": value}))
    with pytest.raises(ValueError, match=match):
        assert checkpoint.tokenizer


def test_a_special_token_may_have_no_row(tmp_path: Path) -> None:
    """It is refused in prompts; an ordinary one would be in any text."""
    tokens = [*llama_metadata()["tokenizer.ggml.tokens"][1][1], "<image>"]
    for kind in (3, 4, 5, 1):
        keys = {
            "tokenizer__ggml__tokens": (ARRAY, (STRING, tokens)),
            "tokenizer__ggml__token_type": (ARRAY, (INT32, [3, 3, 4] + [1] * 9 + [kind])),
            "tokenizer__ggml__eot_token_id": (UINT32, 12),
        }
        checkpoint = open_bytes(tmp_path, llama_bytes(F32, **keys))
        if kind == 1:
            with pytest.raises(ValueError, match=r"13 tokens, .* 12 rows, and token 12 is no spec"):
                assert checkpoint.tokenizer
        else:
            spec = checkpoint.tokenizer
            assert (spec.tokens[12], spec.eos_token_ids) == ("<image>", (0,))


def test_a_tensor_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    tensors = llama_tensors(draw_weights(CONFIG, seed=3))
    tensors.append(tiny_gguf.tensor("blk.0.attn_q.bias", np.ones(64, np.float32)))
    with pytest.raises(ValueError, match=r"1 tensors .* 'blk.0.attn_q.bias' the first"):
        open_bytes(tmp_path, file_bytes(llama_metadata(), tensors))


@pytest.mark.model
def test_the_default_model() -> None:
    checkpoint = GGUFCheckpoint(resolve("smollm2-135m-instruct"))
    model = checkpoint.model
    assert (model.vocab_size, model.num_hidden_layers, model.head_dim) == (49152, 30, 64)
    assert model.tie_word_embeddings
    assert checkpoint.tokenizer.eos_token_ids == (2, 0)
    assert checkpoint.tensor("layers.29.down").shape == (576, 1536)
