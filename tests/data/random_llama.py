"""Small random Llamas, the same numbers with and without torch.

``numpy.random.RandomState`` is a frozen stream: tests draw the very weights again that
``make_llama_reference.py`` gave to transformers. Needs numpy alone.
"""

import numpy as np

# Fields as in a Hugging Face config.json.
_DEFAULT = {
    "vocab_size": 128,
    "hidden_size": 144,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}

CONFIGS: dict[str, dict] = {
    "grouped_tied": _DEFAULT,
    "multi_head_untied": {
        **_DEFAULT,
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    # Original context so short that the test's positions reach every branch of the rule.
    "llama3_rope": {
        **_DEFAULT,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "linear_rope": {
        **_DEFAULT,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "wide_heads": {
        **_DEFAULT,
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
    "llama2_like": {
        **_DEFAULT,
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}


def draw_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Returns float32 weights, ``[out, in]``, by the names of ``GGUFCheckpoint.tensor``.

    Projections have standard deviation ``2 / sqrt(in)``, so that attention is far from uniform;
    the head is scaled for logits that spread over several units.
    """
    random = np.random.RandomState(seed)
    embed, ffn = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key_value = config["num_key_value_heads"] * config["head_dim"]

    def matrix(num_out: int, num_in: int, scale: float = 2.0) -> np.ndarray:
        return (random.standard_normal((num_out, num_in)) * scale / num_in**0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.2 * random.standard_normal(embed)).astype(np.float32)

    weights = {"embed_tokens": matrix(config["vocab_size"], embed, 3.0), "norm": norm()}
    if not config["tie_word_embeddings"]:
        weights["lm_head"] = matrix(config["vocab_size"], embed, 3.0)
    for layer in range(config["num_hidden_layers"]):
        weights |= {
            f"layers.{layer}.input_norm": norm(),
            f"layers.{layer}.q": matrix(query, embed),
            f"layers.{layer}.k": matrix(key_value, embed),
            f"layers.{layer}.v": matrix(key_value, embed),
            f"layers.{layer}.o": matrix(embed, query),
            f"layers.{layer}.post_attention_norm": norm(),
            f"layers.{layer}.gate": matrix(ffn, embed),
            f"layers.{layer}.up": matrix(ffn, embed),
            f"layers.{layer}.down": matrix(embed, ffn),
        }
    return weights


def draw_input_ids(config: dict, seed: int, num_tokens: int = 40) -> list[int]:
    """Returns token ids of a prompt."""
    return (
        np.random.RandomState(seed + 1000).randint(config["vocab_size"], size=num_tokens).tolist()
    )
