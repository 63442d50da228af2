"""From options to an engine with a model in it: every program's first step."""

import dataclasses
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
from checkpoints.vocabulary import check_vocabulary, unused_tokens
from jaxinfer.batch import BatchShape
from jaxinfer.config import STORED, DraftModel, DtypePolicy, ModelConfig
from jaxinfer.drafters import drafter_traits
from jaxinfer.engine import Engine
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.models import quantized_weights
from jaxinfer.request import Ending, SamplingParams
from jaxinfer.sharding import (
    Device,
    can_divide_heads,
    explain_heads,
    make_mesh,
    num_tensor_devices,
    place,
)
from jaxinfer.step import Parameters
from jaxinfer_entrypoints.loading.devices import pick_devices
from jaxinfer_entrypoints.loading.dtypes import describe_rounding, pick_dtypes
from jaxinfer_entrypoints.loading.options import LoadOptions
from jaxinfer_entrypoints.loading.phases import Phases
from jaxinfer_entrypoints.loading.sizes import describe_context, engine_config
from jaxinfer_entrypoints.memory.peak import PeakMemory
from serving.text.tokenizer import Tokenizer

PickShapes = Callable[[Engine, Tokenizer, SamplingParams, Ending], Sequence[BatchShape] | None]


@dataclass(frozen=True)
class Plan:
    """A model to load, its sizes and its devices; nothing is allocated yet.

    ``checkpoint`` is None where a configuration without weights was asked for. ``devices``: of all
    replicas; ``spec`` has those of the first one.
    """

    checkpoint: Checkpoint | None
    spec: EngineSpec
    devices: list[Device]
    draft_checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A compiled engine with its model, its parameters and its tokenizer.

    ``devices``: all that were asked for, of which the engine has the first ``--tensor-parallel``.
    ``default_sampling``, ``default_ending``: where nobody says how.
    """

    options: LoadOptions
    name: str
    spec: EngineSpec
    engine: Engine
    tokenizer: Tokenizer
    default_sampling: SamplingParams
    default_ending: Ending
    devices: list[Device]
    parameters: Parameters
    checkpoint: Checkpoint
    draft_parameters: Parameters | None = None


def largest_shape(engine: Engine, *_: object) -> Sequence[BatchShape]:
    """For work that is all prompt, and for programs that make further engines: no drafts."""
    return [shape for shape in engine.shapes if not shape.num_drafts][-1:]


def load_model(
    options: LoadOptions, phases: Phases, pick_shapes: PickShapes | None = None
) -> LoadedModel:
    """Fetches, loads and compiles what ``options`` ask for.

    ``pick_shapes``: which steps to compile; all, if it is not given. It is called before anything
    large is loaded, with the model's defaults too, and may refuse work that the engine can
    never do.

    Raises ``ValueError`` in one line for anything a user can mend.
    """
    plan = plan_model(options, phases)
    checkpoint, spec = plan.checkpoint, plan.spec
    config = spec.config
    assert checkpoint is not None
    with phases.phase("tokenizer"):
        tokenizer = _build_tokenizer(options.model, checkpoint)
    sampling, ending = SamplingParams(), Ending()
    if options.generation_config:
        sampling, ending = checkpoint.default_sampling, checkpoint.default_ending
        # Rows that no token has are never chosen, and requests cannot name them.
        biases = [bias for bias in sampling.logit_bias if bias[0] < spec.model.num_tokens]
        sampling = dataclasses.replace(sampling, logit_bias=tuple(biases))
    engine = Engine(spec)
    shapes = pick_shapes(engine, tokenizer, sampling, ending) if pick_shapes else None
    parameters = _load(
        phases, "load", checkpoint, plan.spec.dtypes, plan.spec.mesh, engine.abstract_parameters
    )
    draft_parameters = None
    if plan.spec.draft and plan.draft_checkpoint and engine.abstract_draft_parameters:
        draft_parameters = _load(
            phases,
            "load draft",
            plan.draft_checkpoint,
            plan.spec.draft.dtypes,
            plan.spec.mesh,
            engine.abstract_draft_parameters,
        )
    with phases.phase("compile", unit="programs") as progress:
        engine.compile(progress, shapes)
    size = f"{config.num_pages} pages of {config.page_size} tokens, "
    with phases.phase("kv cache", note=size + f"{engine.kv_cache_bytes / 2**20:.0f} MiB"):
        engine.start(parameters, draft_parameters)
    return LoadedModel(
        options=options,
        name=model_name(options.model),
        spec=spec,
        engine=engine,
        tokenizer=tokenizer,
        default_sampling=sampling,
        default_ending=ending,
        devices=plan.devices,
        parameters=parameters,
        checkpoint=checkpoint,
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
        return Tokenizer(description, checkpoint.model.vocab_size)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from error


def model_name(model: str) -> str:
    """Returns a model's name: in the catalog, on the hub, of its folder or its file."""
    path = Path(model)
    if model in CATALOG and not path.exists():
        return model
    on_hub = None if path.exists() else parse_hub_id(model)
    if on_hub:
        return on_hub.name
    return path.resolve().name if path.is_dir() else file_stem(path)


def plan_model(options: LoadOptions, phases: Phases, needs_weights: bool = True) -> Plan:
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
    if drafter_traits(options.drafter[0]).needs_model:
        for_draft = options.of_draft_model
        draft_checkpoint, smaller = _open_model(for_draft.model, phases, needs_weights)
        if checkpoint and draft_checkpoint:
            check_vocabulary(checkpoint, draft_checkpoint, for_draft.model)
        draft = DraftModel(smaller, pick_dtypes(for_draft, draft_checkpoint, devices[0]))
    config = engine_config(options, model, dtypes, mesh, draft)
    if said := describe_context(model, config.max_model_len):
        phases.say(said)
    spec = EngineSpec(model, config, dtypes, mesh, draft)
    return Plan(checkpoint, spec, devices, draft_checkpoint)


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
    for note in checkpoint.notes:
        phases.say(note)
    model = checkpoint.model
    if needs_weights:
        unused = unused_tokens(checkpoint.tokenizer.tokens, model.vocab_size)
        model = dataclasses.replace(model, unused_tokens=unused)
    return checkpoint, model


def new_engine(
    loaded: LoadedModel, shapes: Sequence[BatchShape] | None = None, **changes: Any
) -> Engine:
    """A further engine on the same parameters, ready to run, with some sizes changed.

    Its KV cache comes on top. ``num_pages``, where it is not among ``changes``, is what all slots
    at full length could use, but no more than the first engine has. ``shapes``: those to compile.
    """
    config = dataclasses.replace(loaded.spec.config, **changes)
    if "num_pages" not in changes:
        num_pages = min(config.max_pages_of_slots, loaded.spec.config.num_pages)
        config = dataclasses.replace(config, num_pages=num_pages)
    draft, draft_parameters = loaded.spec.draft, loaded.draft_parameters
    if not config.drafter.needs_model:
        draft, draft_parameters = None, None
    engine = Engine(dataclasses.replace(loaded.spec, config=config, draft=draft))
    engine.compile(shapes=shapes)
    engine.start(loaded.parameters, draft_parameters)
    return engine


def more_engines(loaded: LoadedModel, phases: Phases) -> tuple[Engine, ...]:
    """The first engine and its replicas: the same parameters on the devices that are left."""
    engines, size = [loaded.engine], loaded.engine.spec.mesh.size
    for first in range(size, len(loaded.devices), size):
        mesh = make_mesh(loaded.devices[first : first + size])
        engine = Engine(dataclasses.replace(loaded.spec, mesh=mesh))
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
