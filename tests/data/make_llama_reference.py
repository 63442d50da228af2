"""Writes llama_reference.json: logits and greedy tokens of small random Llamas by transformers.

Runs apart from the project's environment, which has no torch:

    python3.11 -m venv reference && reference/bin/pip install torch==2.13.0 transformers==5.23.0
    reference/bin/python tests/data/make_llama_reference.py

float32 on a CPU, eager attention, no cache: every greedy step runs the whole text again.
"""

import json
from pathlib import Path

import torch
import transformers
from random_llama import CONFIGS, draw_input_ids, draw_weights

NUM_GREEDY = 32
POSITIONS = (0, 1, 7, 20, 39)

_MODEL_NAMES = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_LAYER_NAMES = {
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def main() -> None:
    cases = {name: reference(name, seed) for seed, name in enumerate(CONFIGS)}
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
    path = Path(__file__).with_name("llama_reference.json")
    path.write_text(json.dumps({"source": versions, "cases": cases}, indent=None) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


@torch.no_grad()
def reference(name: str, seed: int) -> dict:
    config = CONFIGS[name]
    model = build(config, seed)
    token_ids = draw_input_ids(config, seed)
    logits = model(torch.tensor([token_ids])).logits[0]
    case = {
        "config": config,
        "seed": seed,
        "input_ids": token_ids,
        # Nine significant digits hold a float32 exactly.
        "logits": {
            str(position): [float(f"{logit:.9g}") for logit in logits[position].tolist()]
            for position in POSITIONS
        },
        "greedy_ids": [],
        "greedy_gaps": [],
    }
    for _ in range(NUM_GREEDY):
        last = model(torch.tensor([token_ids + case["greedy_ids"]])).logits[0, -1]
        best = torch.topk(last, 2)
        case["greedy_ids"].append(int(best.indices[0]))
        case["greedy_gaps"].append(round(float(best.values[0] - best.values[1]), 6))
    print(name, "logits std", float(logits.std()), "smallest gap", min(case["greedy_gaps"]))
    return case


def build(config: dict, seed: int) -> transformers.LlamaForCausalLM:
    fields = dict(config)
    rope = {"rope_type": "default", **(fields.pop("rope_scaling") or {})}
    rope["rope_theta"] = fields.pop("rope_theta")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**fields, rope_parameters=rope, attn_implementation="eager")
    ).eval()
    assert model.config.rope_parameters == rope
    state = {}
    for name, weight in draw_weights(config, seed).items():
        state[hugging_face_name(name) + ".weight"] = torch.from_numpy(weight)
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.float()


def hugging_face_name(name: str) -> str:
    if not name.startswith("layers."):
        return _MODEL_NAMES[name]
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}"


if __name__ == "__main__":
    main()
