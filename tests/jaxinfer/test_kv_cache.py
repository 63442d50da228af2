"""The cost of a page, and the number of pages that fit."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.kv_cache import abstract_kv_pages, page_bytes, plan_num_pages
from jaxinfer.sharding import make_mesh
from tests.conftest import ManyDevices
from tests.jaxinfer.tiny import tiny_model


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


def test_no_more_pages_than_memory_or_use() -> None:
    model, mesh = tiny_model(), make_mesh(jax.devices("cpu")[:1])
    size = page_bytes(model, 16, "float32", mesh)
    plan = {"model": model, "page_size": 16, "dtype": "float32", "mesh": mesh}
    assert plan_num_pages(**plan, max_num_seqs=4, max_model_len=100, memory_bytes=10 * size) == 10
    assert plan_num_pages(**plan, max_num_seqs=4, max_model_len=100, memory_bytes=10**12) == 28
    assert plan_num_pages(**plan, max_num_seqs=4, max_model_len=100, memory_bytes=size - 1) == 0
    # A prefix cache makes use of all there is.
    plan |= {"max_num_seqs": 4, "max_model_len": 100, "prefix_cache": True}
    assert plan_num_pages(**plan, memory_bytes=1000 * size) == 1000
    assert plan_num_pages(**plan, memory_bytes=1 << 60) == 1 << 24


def pages_by_devices() -> list[tuple[int, int]]:
    """Bytes of a page on 1, 2 and 4 devices, and how many pages the bytes of ten make there."""
    model = tiny_model()
    meshes = [make_mesh(jax.devices("cpu")[:count]) for count in (1, 2, 4)]
    ten = 10 * page_bytes(model, 16, "float32", meshes[0])
    return [
        (
            page_bytes(model, 16, "float32", mesh),
            plan_num_pages(model, 16, "float32", 4, 10_000, ten, mesh),
        )
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
