"""One declared matrix in a format, for tests."""

from typing import Any

from flax import nnx

from jaxinfer import weights
from jaxinfer.config import DtypePolicy
from jaxinfer.declaration import Declaration

PLAIN = DtypePolicy("float32", "float32", "float32")


def policy_of(quantization: str) -> DtypePolicy:
    """Float32 but for the matrices."""
    return DtypePolicy("float32", "float32", "float32", quantization=quantization)


def holder(
    shape: tuple[int, ...],
    inputs: tuple[int, ...],
    policy: DtypePolicy,
    axes: tuple[str | None, ...] | None = None,
    num_devices: int = 1,
) -> Any:
    """A module with one matrix, in the format that ``policy`` asks for."""
    names = axes or tuple("abcd"[: len(shape)])

    class Holder(nnx.Module):
        def __init__(self) -> None:
            self.matrix = weights.declare(nnx.Rngs(0), policy, Declaration(shape, names, inputs))

    with nnx.use_eager_sharding(False):
        module = Holder()
        weights.quantize_module(module, policy, num_devices)
    return module
