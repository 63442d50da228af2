"""transformers on torch's CPU backend, the GGUF's weights expanded to float32.

Executed by an interpreter that has torch, transformers, gguf and accelerate (``make peers``).
Eager mode with its dynamic cache, as ``generate`` uses it, without the loop's own overhead.
"""

import argparse
import importlib
import os
import time
from typing import Any

from runner_protocol import Measure, random_ids, run_peer


def start(options: argparse.Namespace) -> tuple[dict[str, Any], Measure]:
    """Loads the model; nothing is fetched."""
    # By name: this project's environment has neither, and its import contracts forbid both.
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    folder, name = os.path.split(os.path.abspath(options.model))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    ).eval()

    def measure(point: dict[str, Any]) -> float:
        with torch.inference_mode():
            return rate(torch, model, point)

    description = {
        "weights": "float32, expanded from the GGUF",
        "activations": "float32",
        "timed": "forward passes and arg max",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return description, measure


def rate(torch: Any, model: Any, point: dict[str, Any]) -> float:
    """Tokens per second of one prefill, or of decode steps after an untimed prefill."""
    ids = torch.tensor(random_ids(point["batch"], point["context"]))
    begun = time.perf_counter()
    output = model(ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    if point["kind"] == "prefill":
        return ids.numel() / (time.perf_counter() - begun)
    begun = time.perf_counter()
    for _ in range(point["steps"]):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return point["batch"] * point["steps"] / (time.perf_counter() - begun)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    run_peer(start)
