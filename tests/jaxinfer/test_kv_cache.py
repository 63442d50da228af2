"""The cost of a page, and the number of pages that fit."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from jaxinfer.config import DraftModel
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.kv_cache import abstract_kv_pages, bytes_per_page, page_bytes, plan_num_pages
from jaxinfer.sharding import make_mesh
from tests.conftest import ManyDevices
from tests.jaxinfer.tiny import CPU_DTYPES, tiny_config, tiny_model


def test_page_bytes_are_those_of_the_arrays() -> None:
    model, mesh = tiny_model(), make_mesh(jax.devices("cpu")[:1])
    for dtype in ("float32", "bfloat16"):
        layers = abstract_kv_pages(model, 10, 16, dtype, mesh)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
        assert total == 10 * page_bytes(model, 16, dtype, mesh)
        assert {leaf.dtype for leaf in jax.tree.leaves(layers)} == {jnp.dtype(dtype)}
        assert len(layers) == model.num_hidden_layers


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu"])
@pytest.mark.parametrize(("head_dim", "times"), [(64, 1.88), (128, 1.93), (256, 1.96)])
def test_a_byte_a_number_and_a_scale_a_row(backend: str, head_dim: int, times: float) -> None:
    """1.85 times the tokens of bfloat16 in the same memory, or more."""
    model, mesh = tiny_model(head_dim=head_dim), make_mesh(jax.devices("cpu")[:1])
    whole = page_bytes(model, 128, "bfloat16", mesh, backend)
    for dtype in ("int8", "fp8"):
        assert whole / page_bytes(model, 128, dtype, mesh, backend) >= times


def spec_for(mesh: Mesh, **changes: Any) -> EngineSpec:
    """Pages of 16 tokens, 4 slots of at most 100 tokens."""
    sizes = {"max_num_seqs": 4, "max_model_len": 100, "page_size": 16} | changes
    return EngineSpec(tiny_model(), tiny_config(**sizes), CPU_DTYPES, mesh)


def test_no_more_pages_than_memory_or_use() -> None:
    mesh = make_mesh(jax.devices("cpu")[:1])
    size = page_bytes(tiny_model(), 16, "float32", mesh)
    spec = spec_for(mesh, prefix_cache=False)
    assert bytes_per_page(spec) == size
    assert plan_num_pages(spec, 10 * size) == 10
    assert plan_num_pages(spec, 10**12) == 28
    assert plan_num_pages(spec, size - 1) == 0
    # A prefix cache makes use of all there is.
    spec = spec_for(mesh, prefix_cache=True)
    assert plan_num_pages(spec, 1000 * size) == 1000
    assert plan_num_pages(spec, 1 << 60) == 1 << 24


def test_a_draft_model_has_its_part_of_a_page() -> None:
    mesh = make_mesh(jax.devices("cpu")[:1])
    draft = DraftModel(tiny_model(num_hidden_layers=1), CPU_DTYPES)
    config = tiny_config(page_size=16, draft="model")
    spec = EngineSpec(tiny_model(), config, CPU_DTYPES, mesh, draft)
    assert 2 * bytes_per_page(spec) == 3 * page_bytes(tiny_model(), 16, "float32", mesh)


def pages_by_devices() -> list[tuple[int, int]]:
    """Bytes of a page on 1, 2 and 4 devices, and how many pages the bytes of ten make there."""
    model = tiny_model()
    meshes = [make_mesh(jax.devices("cpu")[:count]) for count in (1, 2, 4)]
    ten = 10 * page_bytes(model, 16, "float32", meshes[0])
    return [
        (page_bytes(model, 16, "float32", mesh), plan_num_pages(spec_for(mesh), ten))
        for mesh in meshes
    ]


def test_copies_of_kv_heads_are_counted(many_devices: ManyDevices) -> None:
    """2 kv heads: split over 2 devices, one copy each on 2 of 4."""
    (one, ten), *others = many_devices(pages_by_devices)
    assert ten == 10
    assert others == [(one, 10), (2 * one, 5)]


def test_the_backend_decides_how_pages_lie() -> None:
    model, mesh = tiny_model(), make_mesh(jax.devices("cpu")[:1])
    (plain, *_), (packed, *_), (logical, *_) = (
        abstract_kv_pages(model, 10, 16, "float32", mesh, backend)
        for backend in (None, "tpu", "reference")
    )
    assert [leaf.shape for leaf in jax.tree.leaves(plain)] == [(10, 2, 8, 16), (10, 2, 16, 8)]
    assert type(plain) is not type(logical)
    assert packed.pages.shape == (10, 2, 16, 128)  # key and value of a head share 128 lanes
    # Small heads do not fill the lanes, and that is counted.
    assert page_bytes(model, 16, "float32", mesh, "tpu") == 8 * page_bytes(
        model, 16, "float32", mesh
    )
    with pytest.raises(NotImplementedError, match="a page of 4 tokens is no multiple of 8"):
        abstract_kv_pages(model, 10, 4, "float32", mesh, "tpu")
    with pytest.raises(ValueError, match="no backend 'gpu'"):
        abstract_kv_pages(model, 10, 16, "float32", mesh, "gpu")
