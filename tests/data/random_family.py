"""Weights of small random models of every family, the same numbers with and without torch.

Each tensor is drawn by its name in a Hugging Face file: ``numpy.random.RandomState`` is a frozen
stream, so tests draw the very weights that ``make_family_reference.py`` gave to transformers.
Needs numpy alone.
"""

import zlib
from typing import Any

import numpy as np

NUM_PROMPT_TOKENS = 40

_TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def _rope(rope_type: str = "default", theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": theta, **values}


_GEMMA_3 = {
    **_TINY,
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": _rope("linear", 1000000.0, factor=8.0),
        "sliding_attention": _rope(),
    },
}
_LONG_ROPE: dict[str, Any] = {
    "long_factor": [1.0 + 0.7 * i for i in range(6)],
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
}
_PHI_3 = {
    **_TINY,
    "model_type": "phi3",
    "hidden_size": 96,
    "head_dim": 16,
    "pad_token_id": None,
}
_QWEN_3_MOE = {
    **_TINY,
    "model_type": "qwen3_moe",
    "head_dim": 24,
    "moe_intermediate_size": 32,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

# Fields of a config.json, as transformers 5 writes them. Tests have pages of 8 tokens and chunks of
# 16: windows are shorter than a page, across chunks, and longer than the prompt.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {
        **_TINY,
        "model_type": "qwen2",
        "hidden_size": 112,
        "num_attention_heads": 14,
        "tie_word_embeddings": True,
        "rope_parameters": _rope(theta=1000000.0),
    },
    "qwen2_windows": {
        **_TINY,
        "model_type": "qwen2",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": _rope(),
    },
    "qwen2_yarn": {
        **_TINY,
        "model_type": "qwen2",
        "head_dim": 16,
        "rope_parameters": _rope(
            "yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.2
        ),
    },
    "mistral_window_5": {
        **_TINY,
        "model_type": "mistral",
        "head_dim": 16,
        "sliding_window": 5,
        "rope_parameters": _rope(),
    },
    "mistral_window_20": {
        **_TINY,
        "model_type": "mistral",
        "head_dim": 16,
        "sliding_window": 20,
        "rope_parameters": _rope(),
    },
    "mistral_window_200": {
        **_TINY,
        "model_type": "mistral",
        "head_dim": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "sliding_window": 200,
        "rope_parameters": _rope(),
    },
    "qwen3": {
        **_TINY,
        "model_type": "qwen3",
        "head_dim": 24,
        "rope_parameters": _rope(theta=1000000.0),
    },
    "gemma3": {**_GEMMA_3, "sliding_window": 6},
    "gemma3_wide_window": {
        **_GEMMA_3,
        "sliding_window": 100,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {**_PHI_3, "sliding_window": 9, "rope_parameters": _rope()},
    "phi3_long": {
        **_PHI_3,
        "sliding_window": None,
        "original_max_position_embeddings": 16,
        "rope_parameters": _rope(
            "longrope",
            **_LONG_ROPE,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=16,
        ),
    },
    "phi3_short": {
        **_PHI_3,
        "sliding_window": None,
        "original_max_position_embeddings": 128,
        "rope_parameters": _rope(
            "longrope",
            **_LONG_ROPE,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=128,
        ),
    },
    "mixtral": {
        **_TINY,
        "model_type": "mixtral",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "rope_parameters": _rope(theta=1000000.0),
    },
    "qwen3_moe": {**_QWEN_3_MOE, "norm_topk_prob": True, "rope_parameters": _rope()},
    "qwen3_moe_as_routed": {
        **_QWEN_3_MOE,
        "norm_topk_prob": False,
        "num_experts": 8,
        "num_experts_per_tok": 1,
        "rope_parameters": _rope(),
    },
    # All layers have the window: max_window_layers does not count, as it does in Qwen3.
    "qwen3_moe_window": {
        **_QWEN_3_MOE,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_parameters": _rope(),
    },
}


# Where the first draw had a near tie among its greedy tokens.
_SEEDS = {"phi3": 1, "qwen2": 1, "qwen2_windows": 1}


def draw(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor ``name``, ``[out, in]`` for a matrix.

    Matrices have standard deviation ``2 / sqrt(in)``, so that attention is far from uniform, those
    of the vocabulary 3: logits then spread over several units.
    """
    seed = f"{case}/{_SEEDS.get(case, 0)}/{name}"
    random = np.random.RandomState(zlib.crc32(seed.encode()))
    normal = random.standard_normal(shape)
    if "norm" in name:
        # Gemma's files have scales less 1.
        normal = 0.2 * normal + (0.0 if case.startswith("gemma") else 1.0)
    elif len(shape) == 1:
        normal *= 0.5
    else:
        # Gemma multiplies embeddings by the root of their size: they would drown the layers.
        vocabulary = 0.5 if case.startswith("gemma") else 3.0
        is_vocabulary = "embed" in name or "lm_head" in name
        normal *= (vocabulary if is_vocabulary else 2.0) / shape[-1] ** 0.5
    return normal.astype(np.float32)


def draw_prompt(case: str) -> list[int]:
    """Token ids of a prompt."""
    random = np.random.RandomState(zlib.crc32(case.encode()))
    return random.randint(CONFIGS[case]["vocab_size"], size=NUM_PROMPT_TOKENS).tolist()
