"""Places where a model that does not fit would, by arithmetic."""

import dataclasses
from collections.abc import Iterator

from jaxinfer.config import DTYPES, DtypePolicy
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.sharding import can_divide_heads, make_mesh
from jaxinfer_entrypoints.loading.sizes import TPU_KV_FRACTION, DoesNotFitError
from jaxinfer_entrypoints.machine.tpu_targets import GENERATIONS, TpuGeneration, TpuTarget
from jaxinfer_entrypoints.machine.tpu_topology import topology_devices
from jaxinfer_entrypoints.machine.units import MIB
from jaxinfer_entrypoints.memory.plan import smallest_plan

# Tokens: with less no model is of use.
SHORTEST = 1024
# What is proposed for matrices and for pages where floats do not fit.
SMALLER = "int8"


def refusal(name: str, target: TpuTarget, error: DoesNotFitError, flags: str = "") -> str:
    """Says why the model called ``name`` does not fit ``target``, and what would, in one line.

    ``flags``: those of the user's that divide the target's chips in another way than the default.
    """
    spec = error.spec
    config, dtypes = spec.config, spec.dtypes
    plan = smallest_plan(spec)
    generation = target.generation
    left = generation.hbm_bytes - plan.total + plan.kv_pages + plan.page_copies
    missing = "nothing" if left <= 0 else f"{left / MIB:.0f} MiB"
    needed = plan.kv_pages + plan.page_copies
    reason = (
        f"{name} in {dtypes.matrices} does not fit {target.name}: {plan.weights / MIB:.0f} MiB of "
        f"weights, {plan.temporaries / MIB:.0f} of temporaries and {plan.code / MIB:.0f} of code "
        f"on each chip leave {missing} of {generation.hbm_bytes / MIB:.0f} MiB; the KV cache of "
        f"one sequence of {config.max_model_len} tokens takes {needed / MIB:.0f} MiB"
    )
    others = [other for other in GENERATIONS.values() if other is not generation]
    found = []
    for candidate in (generation, *others):
        fitting = smallest_slice(spec, candidate)
        if fitting is None:
            continue
        if (
            flags
            and candidate is generation
            and (fitting.num_chips or 1) <= (target.num_chips or 1)
        ):
            found.append(f"{target.name} without {flags}")
        else:
            found.append(_with_hosts(fitting))
    page = needed / config.max_pages_per_sequence
    shorter = int(max(0, left) * TPU_KV_FRACTION / page) * config.page_size
    if shorter >= SHORTEST:
        found.append(f"{target.name} with --max-model-len {shorter}")
    for smaller, named in _smaller(dtypes):
        smaller_spec = dataclasses.replace(spec, dtypes=smaller)
        if smallest_plan(smaller_spec).total <= generation.hbm_bytes:
            found.append(f"{target.name} with {named}")
            break  # what loses least
    return f"{reason}. It would fit {', or '.join(found) or 'no TPU that is known here'}"


def _smaller(dtypes: DtypePolicy) -> Iterator[tuple[DtypePolicy, str]]:
    """Policies that take less memory, with the flags that ask for them: pages, matrices, both."""
    pages = dataclasses.replace(dtypes, kv_cache=SMALLER)
    has_pages = dtypes.kv_cache in DTYPES
    if has_pages:
        yield pages, f"--kv-dtype {SMALLER}"
    if dtypes.quantization is None:
        yield dataclasses.replace(dtypes, quantization=SMALLER), f"--quantize {SMALLER}"
        if has_pages:
            both = dataclasses.replace(pages, quantization=SMALLER)
            yield both, f"--quantize {SMALLER} --kv-dtype {SMALLER}"


def smallest_slice(spec: EngineSpec, generation: TpuGeneration) -> TpuTarget | None:
    """The fewest chips that the model can be divided over and fits, None without any."""
    for num_chips in generation.slices:
        models = (spec.model, spec.draft.model) if spec.draft else (spec.model,)
        if all(can_divide_heads(model, num_chips) for model in models):
            target = TpuTarget(generation, num_chips)
            mesh = make_mesh(topology_devices(target))
            plan = smallest_plan(dataclasses.replace(spec, mesh=mesh))
            if plan.total <= generation.hbm_bytes:
                return target
    return None


def _with_hosts(target: TpuTarget) -> str:
    """A slice's name, and that it is more than one host can serve."""
    num_chips, one_host = target.num_chips or 1, target.generation.chips_per_host
    several = " (several hosts, for which serving is not built yet)" if num_chips > one_host else ""
    return target.name + several
