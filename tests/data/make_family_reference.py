# pyright: reportMissingImports=false
"""Writes family_reference.json: logits and greedy tokens of small random models by transformers.

Runs apart from the project's environment, which has no torch:

    python3.11 -m venv reference
    reference/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors
    reference/bin/python tests/data/make_family_reference.py

Each model is written as transformers writes it, its tensors are drawn anew by their names in the
file, and the file is read again: names and shapes are those that users have. float32 on a CPU,
eager attention, no cache: every greedy step runs the whole text again.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from random_family import CONFIGS, draw, draw_prompt
from safetensors.torch import load_file, save_file

NUM_GREEDY = 32
POSITIONS = (0, 7, 20, 39)


def main() -> None:
    cases = {case: reference(case) for case in CONFIGS}
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
    path = Path(__file__).with_name("family_reference.json")
    path.write_text(json.dumps({"source": versions, "cases": cases}, indent=None) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


@torch.no_grad()
def reference(case: str) -> dict:
    model, config, shapes = build(case)
    token_ids = draw_prompt(case)
    logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    greedy_ids, greedy_gaps = [], []
    for _ in range(NUM_GREEDY):
        last = model(torch.tensor([token_ids + greedy_ids]), use_cache=False).logits[0, -1]
        best = torch.topk(last, 2)
        greedy_ids.append(int(best.indices[0]))
        greedy_gaps.append(round(float(best.values[0] - best.values[1]), 6))
    print(case, "logits std", float(logits.std()), "smallest gap", min(greedy_gaps))
    return {
        "config": config,
        "tensors": shapes,
        # Seven digits: far beyond the tolerance of 1e-4.
        "logits": {
            str(position): [float(f"{logit:.7g}") for logit in logits[position].tolist()]
            for position in POSITIONS
        },
        "greedy_ids": greedy_ids,
        "greedy_gaps": greedy_gaps,
    }


def build(case: str) -> tuple[torch.nn.Module, dict, dict]:
    fields = dict(CONFIGS[case])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(load_file(path).items())}
        drawn = {name: torch.from_numpy(draw(case, name, shape)) for name, shape in shapes.items()}
        save_file(drawn, path, metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        written = json.loads((Path(folder) / "config.json").read_text())
    kept = {name: value for name, value in written.items() if name != "transformers_version"}
    return model.eval(), kept, shapes


if __name__ == "__main__":
    main()
