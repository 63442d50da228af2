"""What a page costs, and how many fit."""

import jax
import jax.numpy as jnp

from jaxinfer.kv_cache import abstract_kv_pages, page_bytes, plan_num_pages
from jaxinfer.sharding import make_mesh
from tests.jaxinfer.tiny import tiny_model


def test_page_bytes_are_those_of_the_arrays() -> None:
    model, mesh = tiny_model(), make_mesh(jax.devices("cpu")[:1])
    for dtype in ("float32", "bfloat16"):
        layers = abstract_kv_pages(model, 10, 16, dtype, mesh)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
        assert total == 10 * page_bytes(model, 16, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(layers)} == {jnp.dtype(dtype)}
        assert len(layers) == model.num_hidden_layers


def test_no_more_pages_than_memory_or_use() -> None:
    model = tiny_model()
    size = page_bytes(model, 16, "float32")
    plan = {"model": model, "page_size": 16, "dtype": "float32"}
    assert plan_num_pages(**plan, max_num_seqs=4, max_model_len=100, memory_bytes=10 * size) == 10
    assert plan_num_pages(**plan, max_num_seqs=4, max_model_len=100, memory_bytes=10**12) == 28
    assert plan_num_pages(**plan, max_num_seqs=4, max_model_len=100, memory_bytes=size - 1) == 0
    # A prefix cache makes use of all there is.
    plan |= {"max_num_seqs": 4, "max_model_len": 100, "prefix_cache": True}
    assert plan_num_pages(**plan, memory_bytes=1000 * size) == 1000
    assert plan_num_pages(**plan, memory_bytes=1 << 60) == 1 << 24


def test_copies_of_kv_heads_are_counted() -> None:
    """2 kv heads: split over 2 devices, one copy each on 2 of 4."""
    model = tiny_model()
    one = page_bytes(model, 16, "float32")
    assert page_bytes(model, 16, "float32", num_devices=2) == one
    assert page_bytes(model, 16, "float32", num_devices=4) == 2 * one
    assert plan_num_pages(model, 16, "float32", 4, 10_000, 10 * one, num_devices=4) == 5
