"""From command-line options to an engine with a model in it: what every script starts with."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from checkpoints.configs import configured_models, model_config
from checkpoints.fetch.catalog import CATALOG, hub_model, resolve, user_cache_folder
from checkpoints.fetch.hub_id import parse_hub_id
from checkpoints.load import Checkpoint, load_parameters, open_checkpoint
from checkpoints.shard_name import file_stem
from jaxinfer.batch import BatchShape
from jaxinfer.config import STORED, DraftModel, DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.models import quantized_weights
from jaxinfer.request import SamplingParams
from jaxinfer.sharding import (
    Device,
    can_divide_heads,
    explain_heads,
    make_mesh,
    num_tensor_devices,
    place,
)
from jaxinfer.step import Parameters
from jaxinfer_entrypoints.command_line.draft import (
    add_draft_options,
    check_vocabulary,
    draft_kind,
    draft_model_options,
)
from jaxinfer_entrypoints.loading.devices import add_platform_options, pick_devices
from jaxinfer_entrypoints.loading.dtypes import add_format_options, describe_rounding, pick_dtypes
from jaxinfer_entrypoints.loading.phases import Phases
from jaxinfer_entrypoints.loading.sizes import DEFAULT_MAX_MODEL_LEN, engine_config
from jaxinfer_entrypoints.memory.peak import PeakMemory
from pallas_kernels.ragged_paged_attention import IMPLEMENTATIONS
from serving.text.tokenizer import Tokenizer

DEFAULT_MODEL = "smollm2-135m-instruct"

PickShapes = Callable[[Engine, Tokenizer, SamplingParams], Sequence[BatchShape] | None]


@dataclass(frozen=True)
class Plan:
    """What will be loaded where, with which sizes; nothing is allocated yet.

    ``checkpoint`` is None where a configuration without weights was asked for. ``devices``: of all
    replicas; ``mesh``: those of the first one. ``draft`` guesses where a model was asked to.
    """

    checkpoint: Checkpoint | None
    model: ModelConfig
    config: EngineConfig
    dtypes: DtypePolicy
    devices: list[Device]
    mesh: Mesh
    draft: DraftModel | None = None
    draft_checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A compiled engine with its model, its parameters and its tokenizer.

    ``devices``: all that were asked for, of which the engine has the first ``--tensor-parallel``.
    ``default_sampling``: where nobody says how.
    """

    name: str
    model: ModelConfig
    engine: Engine
    engine_config: EngineConfig
    dtypes: DtypePolicy
    tokenizer: Tokenizer
    default_sampling: SamplingParams
    devices: list[Device]
    parameters: Parameters
    checkpoint: Checkpoint
    draft: DraftModel | None = None
    draft_parameters: Parameters | None = None


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options that decide which model runs where and with which sizes."""
    defaults = EngineConfig()
    add_platform_options(parser)
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="a GGUF file, a folder as on the Hugging Face hub or of convert.py, a model of the "
        "hub itself (org/name[@revision][:file.gguf]), or one of: "
        f"{', '.join(sorted(CATALOG))} (default: %(default)s); where no weights are needed also "
        f"one of: {', '.join(configured_models())}",
    )
    group.add_argument(
        "--no-generation-config",
        dest="generation_config",
        action="store_false",
        help="greedy by default, whatever the model's generation_config.json says",
    )
    group.add_argument(
        "--tensor-parallel",
        type=parse_count,
        metavar="N",
        help="devices that share each layer of a model (default: 1; with --tpu as many of its "
        "chips as the model's heads can be divided over)",
    )
    parser.set_defaults(data_parallel=1)
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="weights, activations and KV cache (default: float32 on CPU, else bfloat16)",
    )
    add_format_options(group)
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
    add_draft_options(group)
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
        "--attention",
        choices=list(IMPLEMENTATIONS),
        help="backend of the attention (default: the TPU kernel on TPU, else plain XLA)",
    )
    group.add_argument(
        "--kv-memory",
        type=parse_bytes,
        help="memory of the KV cache on all devices of a replica, such as 512MiB or 4GiB (default: "
        "of what the model leaves free, 80 %% on accelerators, half on CPU but at most 1GiB)",
    )


def largest_shape(engine: Engine, *_: object) -> Sequence[BatchShape]:
    """For work that is all prompt, and for programs that make further engines: no guesses."""
    return [shape for shape in engine.shapes if not shape.num_drafts][-1:]


def load_model(
    options: argparse.Namespace, phases: Phases, pick_shapes: PickShapes | None = None
) -> LoadedModel:
    """Fetches, loads and compiles what ``options`` ask for.

    ``pick_shapes``: which steps to compile; all, if it is not given. It is called before anything
    large is loaded, with the model's default sampling too, and may refuse work that the engine can
    never do.

    Raises ``ValueError`` in one line for anything a user can mend.
    """
    plan = plan_model(options, phases)
    checkpoint, config = plan.checkpoint, plan.config
    assert checkpoint is not None
    with phases.phase("tokenizer"):
        tokenizer = _build_tokenizer(options.model, checkpoint)
    sampling = checkpoint.default_sampling if options.generation_config else SamplingParams()
    engine = Engine(checkpoint.model, config, plan.dtypes, plan.mesh, plan.draft)
    shapes = pick_shapes(engine, tokenizer, sampling) if pick_shapes else None
    parameters = _load(
        phases, "load", checkpoint, plan.dtypes, plan.mesh, engine.abstract_parameters
    )
    draft_parameters = None
    if plan.draft and plan.draft_checkpoint and engine.abstract_draft_parameters:
        draft_parameters = _load(
            phases,
            "load draft",
            plan.draft_checkpoint,
            plan.draft.dtypes,
            plan.mesh,
            engine.abstract_draft_parameters,
        )
    with phases.phase("compile", unit="programs") as progress:
        engine.compile(progress, shapes)
    size = f"{config.num_pages} pages of {config.page_size} tokens, "
    with phases.phase("kv cache", note=size + f"{engine.kv_cache_bytes / 2**20:.0f} MiB"):
        engine.start(parameters, draft_parameters)
    return LoadedModel(
        name=model_name(options.model),
        model=checkpoint.model,
        engine=engine,
        engine_config=config,
        dtypes=plan.dtypes,
        tokenizer=tokenizer,
        default_sampling=sampling,
        devices=plan.devices,
        parameters=parameters,
        checkpoint=checkpoint,
        draft=plan.draft,
        draft_parameters=draft_parameters,
    )


def _load(
    phases: Phases,
    name: str,
    checkpoint: Checkpoint,
    dtypes: DtypePolicy,
    mesh: Mesh,
    wanted: Parameters,
) -> Parameters:
    """A model's parameters on their devices, in a phase of this ``name``."""
    memory = PeakMemory()
    with phases.phase(
        name, "tensors", lambda: memory.describe() + describe_rounding(checkpoint)
    ) as progress:
        parameters = load_parameters(
            checkpoint,
            wanted,
            progress,
            num_tensor_devices(mesh),
            quantized_weights(checkpoint.model, dtypes, mesh),
            stored=dtypes.quantization == STORED,
        )
        return jax.block_until_ready(parameters)


def _build_tokenizer(model: str, checkpoint: Checkpoint) -> Tokenizer:
    description = checkpoint.tokenizer  # whose errors name the file
    try:
        return Tokenizer(description)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from error


def model_name(model: str) -> str:
    """What a model is called: its name in the catalog, on the hub, of its folder or its file."""
    path = Path(model)
    if model in CATALOG and not path.exists():
        return model
    on_hub = None if path.exists() else parse_hub_id(model)
    if on_hub:
        return on_hub.name
    return path.resolve().name if path.is_dir() else file_stem(path)


def plan_model(options: argparse.Namespace, phases: Phases, needs_weights: bool = True) -> Plan:
    """Picks devices, fetches the checkpoint and fixes all sizes; loads no weights.

    Without ``needs_weights`` the model may be one whose configuration is all there is. Raises
    ``ValueError`` in one line for anything a user can mend.
    """
    count = options.data_parallel * (options.tensor_parallel or 1)
    divides = options.tensor_parallel is None and options.tpu is not None
    devices = pick_devices(options, None if divides else count)
    if not options.compile_only:  # such programs cannot be read back
        use_compilation_cache()
    checkpoint, model = _open_model(options.model, phases, needs_weights)
    num_tensor = options.tensor_parallel or 1
    if divides:
        num_tensor = default_tensor_parallel(model, len(devices), options.data_parallel)
        devices = devices[: num_tensor * options.data_parallel]
    mesh = make_mesh(devices[:num_tensor])
    dtypes = pick_dtypes(options, checkpoint, devices[0])
    draft, draft_checkpoint = None, None
    if draft_kind(options)[0] == "model":
        for_draft = draft_model_options(options)
        draft_checkpoint, smaller = _open_model(options.draft, phases, needs_weights)
        if checkpoint and draft_checkpoint:
            check_vocabulary(checkpoint, draft_checkpoint, options.draft)
        draft = DraftModel(smaller, pick_dtypes(for_draft, draft_checkpoint, devices[0]))
    config = engine_config(options, model, dtypes, mesh, draft)
    return Plan(checkpoint, model, config, dtypes, devices, mesh, draft, draft_checkpoint)


def default_tensor_parallel(model: ModelConfig, num_devices: int, num_replicas: int) -> int:
    """The most of a replica's part of ``num_devices`` that the model's heads are divided over.

    Says so when some are left. Raises ``ValueError`` for fewer devices than replicas.
    """
    if num_devices < num_replicas:
        raise ValueError(
            f"--data-parallel {num_replicas} needs as many devices, there are only {num_devices}"
        )
    most = num_devices // num_replicas
    fitting = [n for n in range(1, most + 1) if most % n == 0 and can_divide_heads(model, n)]
    count = max(fitting)
    if count * num_replicas < num_devices:
        heads = explain_heads(model, count)
        print(f"{count * num_replicas} of {num_devices} chips are used: {heads}", file=sys.stderr)
    return count


def _open_model(
    name: str, phases: Phases, needs_weights: bool
) -> tuple[Checkpoint | None, ModelConfig]:
    """The checkpoint, and the model it is of; only the model where that is all there is."""
    names, is_name = configured_models(), not Path(name).exists()
    if is_name and not needs_weights:
        if name in names:
            return None, model_config(name)
        if name not in CATALOG:
            hub_model(name, names)  # or says all names that would do
    elif is_name and name in names and name not in CATALOG:
        raise ValueError(
            f"of {name} only the configuration is here, for --compile-only and "
            f"--explain-sharding: give the path of its GGUF file or folder"
        )
    with phases.phase("download", unit="B") as progress:
        path = resolve(name, progress)
    with phases.phase("open"):
        checkpoint = open_checkpoint(path)
    return checkpoint, checkpoint.model


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
    draft, draft_parameters = loaded.draft, loaded.draft_parameters
    if config.draft != "model":
        draft, draft_parameters = None, None
    engine = Engine(loaded.model, config, loaded.dtypes, loaded.engine.mesh, draft)
    engine.compile(shapes=shapes)
    engine.start(loaded.parameters, draft_parameters)
    return engine


def more_engines(loaded: LoadedModel, phases: Phases) -> tuple[Engine, ...]:
    """The first engine and its replicas: the same parameters on the devices that are left."""
    engines, size = [loaded.engine], loaded.engine.mesh.size
    for first in range(size, len(loaded.devices), size):
        mesh = make_mesh(loaded.devices[first : first + size])
        engine = Engine(loaded.model, loaded.engine_config, loaded.dtypes, mesh, loaded.draft)
        name = f"replica {len(engines) + 1}"
        with phases.phase(name, unit="programs") as progress:
            engine.compile(progress)
            placed = jax.tree.map(place, loaded.parameters, engine.abstract_parameters)
            draft_parameters = loaded.draft_parameters
            if draft_parameters is not None:
                wanted = engine.abstract_draft_parameters
                draft_parameters = jax.tree.map(place, draft_parameters, wanted)
            engine.start(placed, draft_parameters)
        engines.append(engine)
    return tuple(engines)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start is short."""
    jax.config.update("jax_compilation_cache_dir", str(user_cache_folder() / "xla"))
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
