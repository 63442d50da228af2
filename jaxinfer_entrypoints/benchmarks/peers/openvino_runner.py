"""OpenVINO GenAI on the CPU, straight from the GGUF.

Executed by an interpreter that has openvino-genai and openvino-tokenizers (``make peers``).
"""

import argparse
import importlib
import time
from importlib import metadata
from typing import Any

from runner_protocol import Measure, random_ids, run_peer

PROPERTIES = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


def start(options: argparse.Namespace) -> tuple[dict[str, Any], Measure]:
    """Loads the model."""
    openvino: Any = importlib.import_module("openvino")
    genai: Any = importlib.import_module("openvino_genai")
    numpy: Any = importlib.import_module("numpy")
    pipeline = genai.LLMPipeline(options.model, "CPU", INFERENCE_NUM_THREADS=options.threads)
    core = openvino.Core()
    defaults = []
    for name in PROPERTIES:
        value: Any = core.get_property("CPU", name)
        is_type = isinstance(value, openvino.Type)
        defaults.append(value.get_type_name() if is_type else str(value))
    hint, cache, group = defaults

    def generate(batch: int, length: int, num_tokens: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        ids = numpy.array(random_ids(batch, length), dtype=numpy.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        return pipeline.generate(inputs, config)

    def measure(point: dict[str, Any]) -> float:
        batch, length, steps = point["batch"], point["context"], point["steps"]
        if point["kind"] == "prefill":
            begun = time.perf_counter()
            generate(batch, length, 1)
            return batch * length / (time.perf_counter() - begun)
        result = generate(batch, length, steps + 1)
        # When each step's tokens were there, in milliseconds, as the pipeline itself notes it.
        times = result.perf_metrics.raw_metrics.m_new_token_times
        if len(times) != steps + 1:
            raise ValueError(f"{len(times)} steps were noted, {steps + 1} were asked for")
        return batch * steps / ((times[-1] - times[0]) / 1e3)

    packages = ("openvino", "openvino-genai", "openvino-tokenizers")
    description = {
        "weights": "the GGUF's own, compressed in place",
        "activations": f"{hint}, products of weights in 8-bit groups of {group}, KV cache {cache} "
        "(the plugin's defaults on this CPU)",
        "timed": "the whole pipeline, greedy",
        "versions": {name: metadata.version(name) for name in packages},
    }
    return description, measure


if __name__ == "__main__":
    run_peer(start)
