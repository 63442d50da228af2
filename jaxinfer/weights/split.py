"""Products of matrices whose arrays are divided over devices, with a kernel on each device.

The partitioner divides plain operations by itself. Of a kernel it knows nothing, and would gather
the weights for it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import PartitionSpec

from jaxinfer.sharding import TENSOR, partition_spec
from pallas_kernels.quantized_matmul import kernel_platforms

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class ProductAxes:
    """Logical axes of a product [T, I] x [I, O...]: of I, and of O..."""

    inputs: str | None
    outputs: Axes


def split_product(
    multiply: Callable[..., jax.Array],
    rows: jax.Array,
    arrays: Sequence[jax.Array | None],
    axes: Sequence[Axes],
    product: ProductAxes,
    *,
    platforms: Collection[str] | None = None,
) -> jax.Array:
    """``multiply(rows, *arrays)`` on each device with its part of ``arrays``: [T, O...].

    ``rows`` [T, I]. ``axes`` are the logical axes of each of ``arrays``, by which they are divided
    (``None`` for an array that is None is not looked at). ``product`` has those of I and
    of O...; by the table of sharding one of them may be divided. Divided outputs stay where
    they are made. Of divided inputs each device has a part of every sum: they are added up, in one
    exchange. ``multiply`` then sees the numbers of its device only: where it rounds rows to
    integers, the scale of a row is that of the device's part of it, which is not larger.

    Calls ``multiply`` as it is where there is one device, within a ``shard_map``, and on platforms
    that are not of ``platforms`` (None: those that have kernels): there the partitioner has plain
    operations. The mesh is that of the context (``jax.sharding.use_abstract_mesh``,
    ``jax.set_mesh``).
    Raises ``ValueError`` if both inputs and outputs are divided.
    """
    inputs, outputs = product.inputs, product.outputs
    platforms = kernel_platforms() if platforms is None else platforms
    mesh = jax.sharding.get_abstract_mesh()
    is_whole = TENSOR not in mesh.axis_names or mesh.shape[TENSOR] == 1
    device = mesh.abstract_device
    if is_whole or TENSOR in mesh.manual_axes or device is None or device.platform not in platforms:
        return multiply(rows, *arrays)
    rows_spec, products_spec = partition_spec((None, inputs)), partition_spec((None, *outputs))
    if TENSOR in rows_spec and TENSOR in products_spec:
        raise ValueError(f"inputs {inputs} and outputs {outputs} are divided over the same devices")
    given = {index: array for index, array in enumerate(arrays) if array is not None}

    def multiply_part(rows: jax.Array, *parts: jax.Array) -> jax.Array:
        by_index = dict(zip(given, parts, strict=True))
        products = multiply(rows, *(by_index.get(index) for index in range(len(arrays))))
        return jax.lax.psum(products, TENSOR) if TENSOR in rows_spec else products

    specs: list[PartitionSpec] = [partition_spec(axes[index]) for index in given]
    return jax.shard_map(
        multiply_part,
        in_specs=(rows_spec, *specs),
        out_specs=products_spec,
        # Which of the kernel's outputs are the same on every device is not known to it.
        check_vma=False,
    )(rows, *given.values())
