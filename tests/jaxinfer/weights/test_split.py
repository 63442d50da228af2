"""Products divided over eight devices, against those of one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.sharding import make_mesh, named_sharding
from jaxinfer.weights.split import ProductAxes, split_product
from pallas_kernels.quantized_matmul import grouped_matmul, int8_matmul, kernel_platforms
from tests.conftest import ManyDevices
from tests.pallas_kernels.matmul_cases import GroupedCase, Int8Case, check

# Logical axes of the inputs, and of the outputs; arrays have them in these orders.
OUTPUTS_DIVIDED = (None, (None, "ffn"))
INPUTS_DIVIDED = ("ffn", ("embed",))

INT8 = Int8Case("outputs", 8, (256,), (2, 1024), 16)
INT8_INPUTS = Int8Case("inputs", 8, (1024,), (256,), 16)
INT8_GROUPS = Int8Case("groups", 8, (1024,), (256,), 8, 64)
GROUPED = GroupedCase("outputs", 8, 256, (2, 1024), 4, 32, True)
GROUPED_INPUTS = GroupedCase("inputs", 8, 1024, (256,), 4, 32)
CASES = [
    (INT8, OUTPUTS_DIVIDED),
    (INT8_INPUTS, INPUTS_DIVIDED),
    (INT8_GROUPS, INPUTS_DIVIDED),
    (GROUPED, OUTPUTS_DIVIDED),
    (GROUPED_INPUTS, INPUTS_DIVIDED),
]


def operation(case: Any, backend: str) -> tuple[Any, Any]:
    """Returns what multiplies, and the axes of its arrays given those of inputs and outputs."""
    if isinstance(case, GroupedCase):
        multiply = functools.partial(grouped_matmul, backend=backend)
        return multiply, lambda inputs, outputs: [(inputs, *outputs)] * 3
    multiply = functools.partial(
        int8_matmul, activation_bits=case.bits, activation_group=case.group, backend=backend
    )
    return multiply, lambda inputs, outputs: [(*outputs, inputs), outputs]


def divide(case: Any, axes: Any, backend: str) -> tuple[np.ndarray, str]:
    """The products with arrays divided over all devices, and the compiled program."""
    inputs, outputs = axes
    multiply, axes_of_arrays = operation(case, backend)
    mesh = make_mesh(jax.devices("cpu"))
    rows, *arrays = case.draw()
    placed = [
        None if array is None else jax.device_put(array, named_sharding(mesh, one))
        for array, one in zip(arrays, axes_of_arrays(inputs, outputs), strict=True)
    ]

    def product(rows: jax.Array, arrays: Any) -> jax.Array:
        given = axes_of_arrays(inputs, outputs)
        return split_product(
            multiply, rows, arrays, given, ProductAxes(inputs, outputs), platforms=("cpu",)
        )

    placed_rows = jax.device_put(rows, named_sharding(mesh))
    with jax.set_mesh(mesh):
        if backend == "tpu":
            with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
                return np.asarray(jax.jit(product)(placed_rows, placed)), ""
        compiled = jax.jit(product).lower(placed_rows, placed).compile()
        return np.asarray(compiled(placed_rows, placed)), compiled.as_text() or ""


@pytest.mark.parametrize(("case", "axes"), CASES, ids=lambda part: getattr(part, "name", ""))
def test_eight_devices_multiply_as_one(case: Any, axes: Any, many_devices: ManyDevices) -> None:
    products, program = many_devices(divide, case, axes, "xla")
    check(case, case.draw(), products)
    assert "all-gather" not in program
    assert program.count(" all-reduce(") == (axes[0] is not None)


@pytest.mark.parametrize(("case", "axes"), [CASES[1], CASES[3]])
def test_kernels_on_eight_devices(case: Any, axes: Any, many_devices: ManyDevices) -> None:
    products, _ = many_devices(divide, case, axes, "tpu")
    check(case, case.draw(), products)


def test_rows_of_8_bits_have_a_scale_on_each_device(many_devices: ManyDevices) -> None:
    """Each is rounded by no larger a step than the whole row would be."""
    case = Int8Case("", 8, (1024,), (256,), 8)
    products, _ = many_devices(divide, case, INPUTS_DIVIDED, "xla")
    arrays = case.draw()
    exact = int8_matmul(*arrays, activation_bits=16, backend="reference")
    errors = np.abs(products - exact)
    assert (errors <= 0.51 / 127 * case.sizes(arrays) + 1e-30).all()
    whole = int8_matmul(*arrays, activation_bits=8, backend="reference")
    assert np.mean(errors) < np.mean(np.abs(np.asarray(whole - exact)))


def test_elsewhere_nothing_changes() -> None:
    """Programs for CPUs are those of the product itself."""
    arrays = INT8.draw()
    multiply, axes_of_arrays = operation(INT8, "xla")

    def split(rows: jax.Array, *rest: jax.Array) -> jax.Array:
        return split_product(
            multiply, rows, rest, axes_of_arrays(*OUTPUTS_DIVIDED), ProductAxes(*OUTPUTS_DIVIDED)
        )

    assert kernel_platforms() == {"tpu"}
    mesh = jax.sharding.AbstractMesh((8,), ("tensor",))
    for context in (mesh, make_mesh(jax.devices("cpu")[:1]).abstract_mesh):
        with jax.sharding.use_abstract_mesh(context):
            assert str(jax.make_jaxpr(split)(*arrays)) == str(jax.make_jaxpr(multiply)(*arrays))


def test_both_divided_is_refused() -> None:
    mesh = make_mesh(jax.devices("cpu")[:1])
    devices = jax.sharding.AbstractMesh(
        (2,), ("tensor",), abstract_device=mesh.abstract_mesh.abstract_device
    )
    rows = jnp.zeros((8, 256))
    with jax.sharding.use_abstract_mesh(devices), pytest.raises(ValueError, match="same devices"):
        split_product(lambda x: x, rows, [], [], ProductAxes("ffn", ("vocab",)), platforms=("cpu",))
