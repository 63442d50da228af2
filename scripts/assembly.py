"""From command-line options to an engine with a model in it: what every script starts with."""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from checkpoints.catalog import CATALOG, resolve
from checkpoints.load import load_parameters, open_checkpoint
from jaxinfer import models
from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.kv_cache import page_bytes, plan_num_pages
from jaxinfer.sharding import Device, make_mesh
from scripts.phases import Phases
from scripts.platforms import add_platform_options, pick_devices
from serving.tokenizer import Tokenizer

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_MAX_MODEL_LEN = 8192
DEFAULT_CPU_KV_BYTES = 1 << 30
# Of the memory that is free once the parameters are loaded; the rest is for activations.
ACCELERATOR_KV_FRACTION = 0.8


@dataclass(frozen=True)
class LoadedModel:
    """A compiled engine with its model and tokenizer."""

    name: str
    model: ModelConfig
    engine: Engine
    engine_config: EngineConfig
    dtypes: DtypePolicy
    tokenizer: Tokenizer
    devices: list[Device]


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options that decide which model runs where and with which sizes."""
    defaults = EngineConfig()
    add_platform_options(parser)
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"a GGUF file, or one of: {', '.join(sorted(CATALOG))} (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="weights, activations and KV cache (default: float32 on CPU, else bfloat16)",
    )
    group.add_argument(
        "--max-num-seqs",
        type=int,
        default=defaults.max_num_seqs,
        help="sequences that run at once (default: %(default)s)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=defaults.max_num_batched_tokens,
        help="prompt tokens of one step (default: %(default)s)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        help=f"longest prompt plus output, in tokens (default: the model's context, "
        f"at most {DEFAULT_MAX_MODEL_LEN})",
    )
    group.add_argument(
        "--page-size", type=int, help="tokens a KV page (default: 16 on CPU, 64 on GPU, 128 on TPU)"
    )
    group.add_argument(
        "--kv-memory",
        type=parse_bytes,
        help="memory of the KV cache, such as 512MiB or 4GiB (default: 1GiB on CPU, 80 %% of what "
        "the model leaves free on accelerators)",
    )


def load_model(
    options: argparse.Namespace, phases: Phases, compile_steps: bool = True
) -> LoadedModel:
    """Fetches, loads and compiles what ``options`` ask for.

    Raises ``ValueError`` in one line for anything a user can mend.
    """
    devices = pick_devices(options)[:1]  # tensor parallelism is not built yet
    use_compilation_cache()
    with phases.phase("download", unit="B") as progress:
        path = resolve(options.model, progress)
    with phases.phase("open"):
        checkpoint = open_checkpoint(path)
        tokenizer = Tokenizer(checkpoint.tokenizer)
    model = checkpoint.model
    dtypes = DtypePolicy.for_platform(devices[0].platform, options.dtype)
    config = engine_config(options, model, dtypes, devices[0])
    engine = Engine(model, config, dtypes, make_mesh(devices))
    with phases.phase("load", unit="tensors") as progress:
        parameters = load_parameters(checkpoint, engine.abstract_parameters, progress)
        jax.block_until_ready(parameters)
    if compile_steps:
        with phases.phase("compile", unit="programs") as progress:
            engine.compile(progress)
    size = f"{config.num_pages} pages of {config.page_size} tokens, "
    with phases.phase("kv cache", note=size + f"{engine.kv_cache_bytes / 2**20:.0f} MiB"):
        engine.start(parameters)
    name = options.model if options.model in CATALOG else Path(options.model).stem
    return LoadedModel(name, model, engine, config, dtypes, tokenizer, devices)


def engine_config(
    options: argparse.Namespace, model: ModelConfig, dtypes: DtypePolicy, device: Device
) -> EngineConfig:
    """Sizes of the engine; what is not given follows from the model and the platform."""
    context = model.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > context:
        raise ValueError(
            f"--max-model-len {options.max_model_len} is more than the model's context ({context})"
        )
    max_model_len, page_size = options.max_model_len, options.page_size
    if max_model_len is None:
        max_model_len = min(context, DEFAULT_MAX_MODEL_LEN)
    if page_size is None:
        page_size = {"cpu": 16, "gpu": 64}.get(device.platform, 128)
    # Checks the sizes themselves before memory is planned with them.
    EngineConfig(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=1 << 24,
    )
    memory = options.kv_memory
    if memory is None:
        memory = default_kv_bytes(device, model, dtypes)
    num_pages = plan_num_pages(
        model, page_size, dtypes.kv_cache, options.max_num_seqs, max_model_len, memory
    )
    if num_pages * page_size < max_model_len:
        needed = -(-max_model_len // page_size) * page_bytes(model, page_size, dtypes.kv_cache)
        raise ValueError(
            f"a KV cache of {memory / 2**20:.0f} MiB is too small for one sequence of "
            f"{max_model_len} tokens, which takes {needed / 2**20:.0f} MiB: raise --kv-memory or "
            f"lower --max-model-len"
        )
    return EngineConfig(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=num_pages,
    )


def default_kv_bytes(device: Device, model: ModelConfig, dtypes: DtypePolicy) -> int:
    """Memory for the KV cache when the user names none."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return DEFAULT_CPU_KV_BYTES
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0) - parameter_bytes(model, dtypes)
    return max(0, int(free * ACCELERATOR_KV_FRACTION))


def parameter_bytes(model: ModelConfig, dtypes: DtypePolicy) -> int:
    """Bytes of a model's parameters, from its declarations."""
    _, state = models.abstract(model, dtypes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start is short."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(root / "jaxinfer" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def parse_bytes(text: str) -> int:
    """Bytes from 512MiB, 4GiB, 2GB or a plain number, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}; write 512MiB or 4GiB")
    number, prefix, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
    if not 1 <= size <= 1 << 50:
        raise argparse.ArgumentTypeError(f"must be between 1 byte and 1 PiB, got {text!r}")
    return int(size)


def run_main(main: Callable[[], None]) -> None:
    """Runs ``main``; errors a user can mend end the program with one line and status 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
