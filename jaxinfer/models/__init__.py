"""Flax model definitions, one file a family, found by the checkpoint's architecture name."""

import importlib
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxinfer.config import DtypePolicy, ModelConfig

# Architecture name -> module and class; imported when asked for.
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "llama": ("jaxinfer.models.llama", "Llama"),
}


def build(
    model: ModelConfig,
    dtypes: DtypePolicy,
    rngs: nnx.Rngs | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """The Flax module of ``model``, with random weights; under ``nnx.eval_shape`` it costs nothing.

    Its parameters have the physical shapes that ``mesh`` asks for, by default one device's.
    Raises ``ValueError`` listing what is supported for an unknown architecture, and for heads that
    cannot be divided over the mesh.
    """
    if model.architecture not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(
            f"architecture {model.architecture!r} is not supported; supported: {supported}"
        )
    module, name = ARCHITECTURES[model.architecture]
    family = getattr(importlib.import_module(module), name)
    # Parameters carry logical axis names and no mesh: they are placed by jaxinfer.sharding.
    with nnx.use_eager_sharding(False):
        return family(model, dtypes, rngs or nnx.Rngs(0), mesh)


def abstract(
    model: ModelConfig, dtypes: DtypePolicy, mesh: Mesh | None = None
) -> tuple[Any, nnx.State]:
    """The graph definition and the abstract parameters, nothing allocated."""
    return nnx.split(nnx.eval_shape(lambda: build(model, dtypes, mesh=mesh)))
