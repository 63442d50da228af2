"""Sizes of an engine: what the user does not give follows from the model and from free memory."""

import dataclasses

from jax.sharding import Mesh

from jaxinfer.config import MAX_PAGES, DraftModel, DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.kv_cache import bytes_per_page, plan_num_pages
from jaxinfer.sharding import num_tensor_devices
from jaxinfer_entrypoints.loading.options import LoadOptions
from jaxinfer_entrypoints.memory.plan import parameter_bytes, smallest_plan
from jaxinfer_entrypoints.memory.usage import free_bytes
from pallas_kernels.ragged_paged_attention import check_platform

DEFAULT_MAX_MODEL_LEN = 8192
# Tokens a page. On TPU as many as a register has lanes, for quantized pages need that; platforms
# that are not listed are as TPUs.
DEFAULT_PAGE_SIZES = {"cpu": 16, "gpu": 64, "tpu": 128}
# On CPU at most this, and at most this part of what the parameters leave free: others work there.
DEFAULT_CPU_KV_BYTES = 1 << 30
CPU_KV_FRACTION = 0.5
# Of a GPU's memory that is free once the parameters are loaded; the rest is for activations.
GPU_KV_FRACTION = 0.8
# Of a TPU's memory that the plan leaves: temporaries and code are estimates.
TPU_KV_FRACTION = 0.97


class DoesNotFitError(ValueError):
    """A model and the sizes asked for need more memory than there is.

    ``spec.config`` has all sizes but the number of pages.
    """

    def __init__(self, message: str, spec: EngineSpec) -> None:
        super().__init__(message)
        self.spec = spec


def engine_config(
    options: LoadOptions,
    model: ModelConfig,
    dtypes: DtypePolicy,
    mesh: Mesh,
    draft: DraftModel | None = None,
) -> EngineConfig:
    """Sizes of the engine; what is not given follows from the model and the platform.

    Raises ``ValueError`` for sizes that cannot be, ``DoesNotFitError`` for too little memory.
    """
    device = mesh.devices.flat[0]
    if options.attention is not None:
        check_platform(options.attention, device.platform, device.device_kind)
    context = model.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > context:
        raise ValueError(
            f"--max-model-len {options.max_model_len} is more than the model's context ({context})"
        )
    max_model_len, page_size = options.max_model_len, options.page_size
    if max_model_len is None:
        max_model_len = default_max_model_len(model)
    if page_size is None:
        page_size = DEFAULT_PAGE_SIZES.get(device.platform, DEFAULT_PAGE_SIZES["tpu"])
    steps = options.max_steps_per_call
    if steps is None:
        # A step of a small model on an accelerator takes less time than sending it.
        steps = 1 if device.platform == "cpu" else 4
    kind, num_draft_layers = options.drafter
    # Checks the sizes themselves before memory is planned with them.
    config = EngineConfig(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=MAX_PAGES,
        prefix_cache=options.prefix_cache,
        max_steps_per_call=steps,
        priority_seconds=options.priority_seconds,
        batch_invariant=options.batch_invariant,
        attention=options.attention,
        draft=kind,
        num_draft_layers=num_draft_layers,
        num_drafts=options.num_drafts,
        verify=options.verify,
    )
    spec = EngineSpec(model, config, dtypes, mesh, draft)
    memory = options.kv_memory
    if memory is None:
        memory = default_kv_bytes(spec, options.data_parallel)
    else:
        check_kv_bytes(memory, mesh, options.data_parallel)
    num_pages = plan_num_pages(spec, memory)
    if num_pages * page_size < max_model_len:
        needed = config.max_pages_per_sequence * bytes_per_page(spec)
        raise DoesNotFitError(
            f"a KV cache of {memory / 2**20:.0f} MiB is too small for one sequence of "
            f"{max_model_len} tokens, which takes {needed / 2**20:.0f} MiB: raise --kv-memory or "
            f"lower --max-model-len",
            spec,
        )
    return dataclasses.replace(config, num_pages=num_pages)


def default_max_model_len(model: ModelConfig) -> int:
    """The model's context within bounds, with longrope the original one.

    Up to there its short factors count, which are what short texts were trained with; keys that lie
    in pages cannot be rotated anew, so that a server takes one set for all.
    """
    short = _short_context(model) or model.max_position_embeddings
    return min(model.max_position_embeddings, short, DEFAULT_MAX_MODEL_LEN)


def describe_context(model: ModelConfig, max_model_len: int) -> str:
    """Says which factors of longrope count, if there is a choice; "" where there is none."""
    short = _short_context(model)
    if short is None or short >= model.max_position_embeddings:
        return ""
    if max_model_len > short:
        return (
            f"--max-model-len {max_model_len} is more than {short}: the long factors of the "
            "model's rope count for all prompts, short ones too"
        )
    return (
        f"the short factors of the model's rope count, for up to {short} tokens; a larger "
        f"--max-model-len (up to {model.max_position_embeddings}) takes the long ones for all"
    )


def _short_context(model: ModelConfig) -> int | None:
    scaling = model.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return None
    return scaling.original_max_position_embeddings


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


def default_kv_bytes(spec: EngineSpec, num_replicas: int) -> int:
    """Memory on all devices of a replica for the KV cache when the user names none.

    ``spec.config`` has all sizes but the number of pages. The parameters are not loaded yet; the
    first device speaks for all.
    """
    mesh = spec.mesh
    device, num_devices = mesh.devices.flat[0], num_tensor_devices(mesh)
    free = free_bytes(device)
    if free is None:
        return DEFAULT_CPU_KV_BYTES
    if device.platform == "tpu":
        return num_devices * int(tpu_kv_bytes(spec, free))
    loaded = parameter_bytes(spec.model, spec.dtypes, mesh)
    if spec.draft:
        loaded += parameter_bytes(spec.draft.model, spec.draft.dtypes, mesh)
    if device.platform == "cpu":  # its devices share the host's memory
        left = max(0, free // num_replicas - num_devices * loaded)
        return min(DEFAULT_CPU_KV_BYTES, int(left * CPU_KV_FRACTION))
    return num_devices * int(max(0, free - loaded) * GPU_KV_FRACTION)


def tpu_kv_bytes(spec: EngineSpec, free: int) -> int:
    """Returns what all else leaves of a chip's ``free`` bytes to the KV cache, not below 0."""
    plan = smallest_plan(spec)
    left = int((free - plan.total + plan.kv_pages + plan.page_copies) * TPU_KV_FRACTION)
    return max(0, left * plan.kv_pages // (plan.kv_pages + plan.page_copies))
