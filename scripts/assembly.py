"""From command-line options to an engine with a model in it: what every script starts with."""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from checkpoints.catalog import CATALOG, resolve
from checkpoints.load import load_parameters, open_checkpoint
from jaxinfer import models
from jaxinfer.batch import BatchShape
from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.kv_cache import page_bytes, plan_num_pages
from jaxinfer.sharding import Device, make_mesh
from jaxinfer.step import Parameters
from scripts.memory import free_bytes
from scripts.phases import Phases
from scripts.platforms import add_platform_options, pick_devices
from serving.tokenizer import Tokenizer

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_MAX_MODEL_LEN = 8192
# On CPU at most this, and at most this part of what the parameters leave free: others work there.
DEFAULT_CPU_KV_BYTES = 1 << 30
CPU_KV_FRACTION = 0.5
# Of the memory that is free once the parameters are loaded; the rest is for activations.
ACCELERATOR_KV_FRACTION = 0.8


@dataclass(frozen=True)
class LoadedModel:
    """A compiled engine with its model, its parameters and its tokenizer."""

    name: str
    model: ModelConfig
    engine: Engine
    engine_config: EngineConfig
    dtypes: DtypePolicy
    tokenizer: Tokenizer
    devices: list[Device]
    parameters: Parameters


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
        "--max-steps-per-call",
        type=int,
        help="decode steps that run in one call while nobody waits: more tokens at once, less "
        "often (default: 1 on CPU, else 4)",
    )
    group.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="compute every prompt anew",
    )
    group.add_argument(
        "--no-batch-invariance",
        dest="batch_invariant",
        action="store_false",
        help="faster kernels on CPU, with which tokens may depend on what else is being served",
    )
    group.add_argument(
        "--kv-memory",
        type=parse_bytes,
        help="memory of the KV cache, such as 512MiB or 4GiB (default: of what the model leaves "
        "free, 80 %% on accelerators, half on CPU but at most 1GiB)",
    )


def load_model(
    options: argparse.Namespace, phases: Phases, *, one_program: bool = False
) -> LoadedModel:
    """Fetches, loads and compiles what ``options`` ask for.

    ``one_program``: only the largest step, for work that is all prompt.

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
    with phases.phase("compile", unit="programs") as progress:
        engine.compile(progress, engine.shapes[-1:] if one_program else None)
    size = f"{config.num_pages} pages of {config.page_size} tokens, "
    with phases.phase("kv cache", note=size + f"{engine.kv_cache_bytes / 2**20:.0f} MiB"):
        engine.start(parameters)
    name = options.model if options.model in CATALOG else Path(options.model).stem
    return LoadedModel(name, model, engine, config, dtypes, tokenizer, devices, parameters)


def new_engine(
    loaded: LoadedModel, shapes: Sequence[BatchShape] | None = None, **changes: Any
) -> Engine:
    """A further engine on the same parameters, ready to run, with some sizes changed.

    Its KV cache comes on top. ``num_pages``, where it is not among ``changes``, is what all slots
    at full length could use, but no more than the first engine has. ``shapes``: those to compile.
    """
    config = dataclasses.replace(loaded.engine_config, **changes)
    if "num_pages" not in changes:
        most = config.max_num_seqs * config.max_pages_per_sequence
        config = dataclasses.replace(config, num_pages=min(most, loaded.engine_config.num_pages))
    engine = Engine(loaded.model, config, loaded.dtypes, loaded.engine.mesh)
    engine.compile(shapes=shapes)
    engine.start(loaded.parameters)
    return engine


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
    steps = options.max_steps_per_call
    if steps is None:
        # A step of a small model on an accelerator takes less time than sending it.
        steps = 1 if device.platform == "cpu" else 4
    # Checks the sizes themselves before memory is planned with them.
    config = EngineConfig(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=1 << 24,
        prefix_cache=options.prefix_cache,
        max_steps_per_call=steps,
        batch_invariant=options.batch_invariant,
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
    return dataclasses.replace(config, num_pages=num_pages)


def default_kv_bytes(device: Device, model: ModelConfig, dtypes: DtypePolicy) -> int:
    """Memory for the KV cache when the user names none; the parameters are not loaded yet."""
    free = free_bytes(device)
    if free is None:
        return DEFAULT_CPU_KV_BYTES
    left = max(0, free - parameter_bytes(model, dtypes))
    if device.platform == "cpu":
        return min(DEFAULT_CPU_KV_BYTES, int(left * CPU_KV_FRACTION))
    return int(left * ACCELERATOR_KV_FRACTION)


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
