"""The table of arrays and where they lie that ``serve.py --explain-sharding`` prints."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxinfer import models
from jaxinfer.kv_cache import KV_PAGES_AXES
from jaxinfer.sharding import (
    abstract_parameters,
    device_bytes,
    explain_heads,
    make_mesh,
    named_sharding,
    num_tensor_devices,
)
from jaxinfer.step_state import StepState, abstract_state
from jaxinfer_entrypoints.loading.assembly import Plan
from jaxinfer_entrypoints.machine.units import MIB


@dataclass(frozen=True)
class Array:
    """One line of the table, before layers are grouped."""

    name: str
    logical: tuple[int, ...]
    physical: tuple[int, ...]
    axes: tuple[str | None, ...]
    spec: str
    device_bytes: int


def explain_sharding(plan: Plan) -> str:
    """A table of parameters, KV pages and step state, totals of a device, and the rule for heads.

    Equal arrays of several layers are one line. Temporaries are not in it: nothing is compiled.
    """
    model, num_devices = plan.spec.model, num_tensor_devices(plan.spec.mesh)
    sections = {
        "parameters": list(_parameters(plan)),
        "KV pages": list(_kv_pages(plan)),
        "step state": list(_step_state(plan)),
    }
    rows = [("array", "logical", "physical", "axes", "partition", "bytes a device")]
    for arrays in sections.values():
        rows += [_row(array, count) for array, count in _grouped(arrays)]
    lines = _aligned(rows)
    totals = {
        name: sum(array.device_bytes for array in arrays) for name, arrays in sections.items()
    }
    lines += [f"{name}: {size / MIB:.2f} MiB a device" for name, size in totals.items()]
    lines.append(f"total: {sum(totals.values()) / MIB:.2f} MiB on each of {num_devices} device(s)")
    lines.append(explain_heads(model, num_devices))
    return "\n".join(lines)


def _parameters(plan: Plan) -> Iterator[Array]:
    """By their own declarations, made for this mesh and for one device."""
    _, state = models.abstract(plan.spec.model, plan.spec.dtypes, plan.spec.mesh)
    _, logical = models.abstract(plan.spec.model, plan.spec.dtypes)
    declared, logical = dict(nnx.to_flat_state(state)), dict(nnx.to_flat_state(logical))
    for entries, leaf in jax.tree.leaves_with_path(abstract_parameters(state, plan.spec.mesh)):
        path = tuple(entry.key for entry in entries)
        axes = declared[path].get_metadata().get("out_sharding") or ()
        name = ".".join(str(key) for key in path)
        yield _array(name, logical[path].get_value().shape, leaf, axes)


def _kv_pages(plan: Plan) -> Iterator[Array]:
    logical = _abstract_state(plan, make_mesh(plan.devices[:1])).kv_pages
    physical = _abstract_state(plan, plan.spec.mesh).kv_pages
    for layer, (ours, theirs) in enumerate(zip(physical, logical, strict=True)):
        fields = jax.tree.leaves_with_path(ours)
        for ((field,), pages), one in zip(fields, jax.tree.leaves(theirs), strict=True):
            axes = KV_PAGES_AXES + (None,) * (pages.ndim - len(KV_PAGES_AXES))
            yield _array(f"kv_pages.{layer}.{field.name}", one.shape, pages, axes)


def _step_state(plan: Plan) -> Iterator[Array]:
    """Everything but the pages; every device has all of it."""
    state = _abstract_state(plan, plan.spec.mesh)
    for field in dataclasses.fields(state):
        if field.name not in ("kv_pages", "draft_kv_pages"):
            leaf = getattr(state, field.name)
            yield _array(f"state.{field.name}", leaf.shape, leaf, ())


def _abstract_state(plan: Plan, mesh: Mesh) -> StepState:
    return abstract_state(dataclasses.replace(plan.spec, mesh=mesh))


def _array(name: str, logical: tuple[int, ...], leaf: Any, axes: Sequence[str | None]) -> Array:
    # By the table, in words a reader finds there; that the array obeys it is one comparison.
    expected = named_sharding(leaf.sharding.mesh, axes)
    assert leaf.sharding.is_equivalent_to(expected, len(leaf.shape)), name
    spec = "(" + ", ".join(part or "-" for part in expected.spec) + ")" if axes else "whole"
    return Array(name, logical, leaf.shape, tuple(axes), spec, device_bytes(leaf))


def _grouped(arrays: Sequence[Array]) -> Iterator[tuple[Array, int]]:
    """Arrays that differ in their layer's number only, as one with the range in its name."""
    groups: dict[Array, list[str]] = {}
    for array in arrays:
        parts = array.name.split(".")
        layer = parts[1:2] if len(parts) >= 3 else []
        name = ".".join([parts[0], "{}", *parts[2:]]) if layer else array.name
        groups.setdefault(dataclasses.replace(array, name=name), []).extend(layer)
    for array, layers in groups.items():
        name = array.name.format("-".join(layers[:1] + layers[1:][-1:]))
        yield dataclasses.replace(array, name=name), max(1, len(layers))


def _row(array: Array, count: int) -> tuple[str, ...]:
    times = f" x{count}" if count > 1 else ""
    axes = "(" + ", ".join(axis or "-" for axis in array.axes) + ")" if array.axes else "-"
    return (
        array.name + times,
        _dimensions(array.logical),
        _dimensions(array.physical) if array.physical != array.logical else "same",
        axes,
        array.spec,
        f"{count * array.device_bytes:,}",
    )


def _dimensions(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False))
        + "  "
        + row[-1].rjust(widths[-1])
        for row in rows
    ]
