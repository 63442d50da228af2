"""Chips as machine/tpu_targets.py describes them, against the compiler's word."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.sharding import make_mesh, named_sharding
from jaxinfer_entrypoints.machine.tpu_targets import GENERATIONS, TpuGeneration, TpuTarget
from jaxinfer_entrypoints.machine.tpu_topology import topology_devices

COMPILABLE = [generation for generation in GENERATIONS.values() if generation.slices]


@pytest.mark.parametrize("generation", COMPILABLE, ids=lambda generation: generation.name)
def test_slices_have_their_chips(generation: TpuGeneration) -> None:
    for num_chips in (None, *[size for size in generation.slices if size <= 16]):
        devices = topology_devices(TpuTarget(generation, num_chips))
        assert len(devices) == (num_chips or 1)
        assert devices[0].device_kind in generation.device_kinds
        hosts = {device.process_index for device in devices}
        assert (len(hosts) == 1) == ((num_chips or 1) <= generation.chips_per_host)


@pytest.mark.parametrize("generation", COMPILABLE, ids=lambda generation: generation.name)
def test_memory_of_a_program_is_the_compilers(generation: TpuGeneration) -> None:
    mesh = make_mesh(topology_devices(TpuTarget(generation, None)))
    huge = jax.ShapeDtypeStruct((1 << 38,), jnp.int8, sharding=named_sharding(mesh))
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: x + 1).trace(huge).lower().compile()
    (limit,) = set(re.findall(r"exceeds available HBM \(([\d.]+)G\)", str(error.value)))
    assert generation.hbm_bytes == int(float(limit) * (1 << 30))


@pytest.mark.parametrize("generation", COMPILABLE, ids=lambda generation: generation.name)
def test_published_peaks_are_near_those_of_the_kernel_library(generation: TpuGeneration) -> None:
    """It gives those of a core."""
    mesh = make_mesh(topology_devices(TpuTarget(generation, None)))
    with jax.set_mesh(mesh):
        info = pltpu.get_tpu_info()
    cores = generation.cores_per_chip
    assert generation.bf16_flops_per_second == pytest.approx(
        cores * info.bf16_ops_per_second, rel=0.01
    )
    assert generation.hbm_bytes_per_second == pytest.approx(
        cores * info.mem_bw_bytes_per_second, rel=0.15
    )
