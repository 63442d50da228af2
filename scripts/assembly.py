"""From command-line options to an engine with a model in it: what every script starts with."""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from checkpoints.catalog import CATALOG, resolve
from checkpoints.load import Checkpoint, load_parameters, open_checkpoint
from jaxinfer import models
from jaxinfer.batch import BatchShape
from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.kv_cache import page_bytes, plan_num_pages
from jaxinfer.sharding import Device, abstract_parameters, make_mesh, num_tensor_devices
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


PickShapes = Callable[[Engine, Tokenizer], Sequence[BatchShape] | None]


@dataclass(frozen=True)
class Plan:
    """What will be loaded where, with which sizes; nothing is allocated yet.

    ``devices``: of all replicas; ``mesh``: those of the first one.
    """

    checkpoint: Checkpoint
    config: EngineConfig
    dtypes: DtypePolicy
    devices: list[Device]
    mesh: Mesh


@dataclass(frozen=True)
class LoadedModel:
    """A compiled engine with its model, its parameters and its tokenizer.

    ``devices``: all that were asked for, of which the engine has the first ``--tensor-parallel``.
    """

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
        "--tensor-parallel",
        type=parse_count,
        default=1,
        metavar="N",
        help="devices that share each layer of a model (default: %(default)s)",
    )
    parser.set_defaults(data_parallel=1)
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
        help=f"prompt tokens of one step, a multiple of {defaults.chunk_tile} "
        "(default: %(default)s)",
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
        "--priority-seconds",
        type=float,
        default=defaults.priority_seconds,
        help="how much longer a request waits than one of the next higher priority before it goes "
        "first all the same (default: %(default)s)",
    )
    group.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="share no pages between requests; choices of one request still do",
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
        help="memory of the KV cache on all devices of a replica, such as 512MiB or 4GiB (default: "
        "of what the model leaves free, 80 %% on accelerators, half on CPU but at most 1GiB)",
    )


def largest_shape(engine: Engine, _: Tokenizer) -> Sequence[BatchShape]:
    """For work that is all prompt, and for programs that make further engines."""
    return engine.shapes[-1:]


def load_model(
    options: argparse.Namespace, phases: Phases, pick_shapes: PickShapes | None = None
) -> LoadedModel:
    """Fetches, loads and compiles what ``options`` ask for.

    ``pick_shapes``: which steps to compile; all, if it is not given. It is called before anything
    large is loaded, and may refuse work that the engine can never do.

    Raises ``ValueError`` in one line for anything a user can mend.
    """
    plan = plan_model(options, phases)
    checkpoint, config = plan.checkpoint, plan.config
    with phases.phase("tokenizer"):
        tokenizer = Tokenizer(checkpoint.tokenizer)
    engine = Engine(checkpoint.model, config, plan.dtypes, plan.mesh)
    shapes = pick_shapes(engine, tokenizer) if pick_shapes else None
    with phases.phase("load", unit="tensors") as progress:
        parameters = load_parameters(
            checkpoint, engine.abstract_parameters, progress, num_tensor_devices(plan.mesh)
        )
        jax.block_until_ready(parameters)
    with phases.phase("compile", unit="programs") as progress:
        engine.compile(progress, shapes)
    size = f"{config.num_pages} pages of {config.page_size} tokens, "
    with phases.phase("kv cache", note=size + f"{engine.kv_cache_bytes / 2**20:.0f} MiB"):
        engine.start(parameters)
    name = options.model if options.model in CATALOG else Path(options.model).stem
    return LoadedModel(
        name=name,
        model=checkpoint.model,
        engine=engine,
        engine_config=config,
        dtypes=plan.dtypes,
        tokenizer=tokenizer,
        devices=plan.devices,
        parameters=parameters,
    )


def plan_model(options: argparse.Namespace, phases: Phases) -> Plan:
    """Picks devices, fetches the checkpoint and fixes all sizes; loads no weights.

    Raises ``ValueError`` in one line for anything a user can mend.
    """
    devices = pick_devices(options, options.tensor_parallel * options.data_parallel)
    mesh = make_mesh(devices[: options.tensor_parallel])
    use_compilation_cache()
    with phases.phase("download", unit="B") as progress:
        path = resolve(options.model, progress)
    with phases.phase("open"):
        checkpoint = open_checkpoint(path)
    dtypes = DtypePolicy.for_platform(devices[0].platform, options.dtype)
    config = engine_config(options, checkpoint.model, dtypes, mesh)
    return Plan(checkpoint, config, dtypes, devices, mesh)


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


def more_engines(loaded: LoadedModel, phases: Phases) -> tuple[Engine, ...]:
    """The first engine and its replicas: the same parameters on the devices that are left."""
    engines, size = [loaded.engine], loaded.engine.mesh.size
    for first in range(size, len(loaded.devices), size):
        mesh = make_mesh(loaded.devices[first : first + size])
        engine = Engine(loaded.model, loaded.engine_config, loaded.dtypes, mesh)
        name = f"replica {len(engines) + 1}"
        with phases.phase(name, unit="programs") as progress:
            engine.compile(progress)
            placed = jax.tree.map(
                lambda array, wanted: jax.device_put(array, wanted.sharding),
                loaded.parameters,
                engine.abstract_parameters,
            )
            engine.start(placed)
        engines.append(engine)
    return tuple(engines)


def engine_config(
    options: argparse.Namespace, model: ModelConfig, dtypes: DtypePolicy, mesh: Mesh
) -> EngineConfig:
    """Sizes of the engine; what is not given follows from the model and the platform."""
    device, num_devices = mesh.devices.flat[0], num_tensor_devices(mesh)
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
        priority_seconds=options.priority_seconds,
        batch_invariant=options.batch_invariant,
    )
    memory = options.kv_memory
    if memory is None:
        memory = default_kv_bytes(model, dtypes, mesh, options.data_parallel)
    else:
        check_kv_bytes(memory, mesh, options.data_parallel)
    num_pages = plan_num_pages(
        model,
        page_size,
        dtypes.kv_cache,
        options.max_num_seqs,
        max_model_len,
        memory,
        num_devices,
        options.prefix_cache,
    )
    if num_pages * page_size < max_model_len:
        size = page_bytes(model, page_size, dtypes.kv_cache, num_devices)
        needed = -(-max_model_len // page_size) * size
        raise ValueError(
            f"a KV cache of {memory / 2**20:.0f} MiB is too small for one sequence of "
            f"{max_model_len} tokens, which takes {needed / 2**20:.0f} MiB: raise --kv-memory or "
            f"lower --max-model-len"
        )
    return dataclasses.replace(config, num_pages=num_pages)


def check_kv_bytes(memory: int, mesh: Mesh, num_replicas: int) -> None:
    """Raises ``ValueError`` when ``memory`` a replica is more than its devices have free."""
    free = free_bytes(mesh.devices.flat[0])
    if free is None:
        return
    # CPU devices, those of all replicas, share the host's memory.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    wanted = memory * num_replicas if is_cpu else memory
    free = free if is_cpu else free * num_tensor_devices(mesh)
    if wanted > free:
        raise ValueError(
            f"--kv-memory asks for {wanted / 2**20:.0f} MiB, of which {free / 2**20:.0f} MiB are "
            f"free: lower it"
        )


def default_kv_bytes(model: ModelConfig, dtypes: DtypePolicy, mesh: Mesh, num_replicas: int) -> int:
    """Memory on all devices of a replica for the KV cache when the user names none.

    The parameters are not loaded yet; the first device speaks for all.
    """
    device, num_devices = mesh.devices.flat[0], num_tensor_devices(mesh)
    free = free_bytes(device)
    if free is None:
        return DEFAULT_CPU_KV_BYTES
    loaded = parameter_bytes(model, dtypes, mesh)
    if device.platform == "cpu":  # its devices share the host's memory
        left = max(0, free // num_replicas - num_devices * loaded)
        return min(DEFAULT_CPU_KV_BYTES, int(left * CPU_KV_FRACTION))
    return num_devices * int(max(0, free - loaded) * ACCELERATOR_KV_FRACTION)


def parameter_bytes(model: ModelConfig, dtypes: DtypePolicy, mesh: Mesh) -> int:
    """Bytes of a model's parameters on each device, from its declarations."""
    _, state = models.abstract(model, dtypes, mesh)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract_parameters(state, mesh))
    )


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


def parse_count(text: str) -> int:
    """A positive number of devices, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return int(text)
