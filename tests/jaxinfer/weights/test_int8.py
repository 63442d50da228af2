"""Matrices in 8 bits: what becomes of their numbers, and which arrays stand for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer import weights
from jaxinfer.config import DtypePolicy
from jaxinfer.weights.int8 import Int8Format, Int8Matrix
from tests.jaxinfer.weights.declared import PLAIN, holder, policy_of

INT8 = policy_of("int8")
RANDOM = np.random.default_rng(0)


def declare(shape: tuple[int, ...], inputs: tuple[int, ...], policy: DtypePolicy = INT8):
    return holder(shape, inputs, policy).matrix


@pytest.mark.parametrize(
    ("shape", "inputs"), [((24, 5), (0,)), ((24, 2, 3, 8), (0,)), ((2, 3, 8, 20), (0, 1, 2))]
)
def test_numbers_are_off_by_half_a_step_at_most(
    shape: tuple[int, ...], inputs: tuple[int, ...]
) -> None:
    matrix = RANDOM.standard_normal(shape).astype(np.float32)
    arrays = declare(shape, inputs).quantize(matrix)
    values, scales = arrays["values"], arrays["scales"]
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)
    assert np.abs(values.astype(int)).max() == 127
    outputs = [axis for axis in range(len(shape)) if axis not in inputs]
    ordered = matrix.transpose(*outputs, *inputs)
    ordered = ordered.reshape(*scales.shape, -1)
    assert values.shape == ordered.shape
    step = scales[..., None]
    assert (np.abs(values * step - ordered) <= step * 0.50001).all()
    # The largest number of every output is kept.
    over = tuple(range(scales.ndim, values.ndim))
    np.testing.assert_allclose(
        np.abs(values * step).max(axis=over), np.abs(ordered).max(axis=over), rtol=1e-6
    )


def test_zeros_stay_zeros() -> None:
    arrays = declare((8, 4), (0,)).quantize(np.zeros((8, 4), np.float32))
    assert not np.any(arrays["values"])
    assert not np.any(arrays["scales"])


def test_numpy_and_jax_make_the_same() -> None:
    matrix, weight = RANDOM.standard_normal((48, 333)).astype(np.float32), declare((48, 333), (0,))
    by_numpy, by_jax = weight.quantize(matrix), weight.quantize(jnp.asarray(matrix))
    compiled = jax.jit(weight.quantize)(matrix)  # where XLA may divide in another way
    for name in ("values", "scales"):
        assert isinstance(by_numpy[name], np.ndarray)
        assert isinstance(by_jax[name], jax.Array)
        np.testing.assert_array_equal(by_numpy[name], by_jax[name])
        np.testing.assert_array_equal(by_numpy[name], compiled[name])


def test_arrays_say_their_axes() -> None:
    weight = declare((2, 3, 8, 20), (0, 1, 2))
    assert weight.values.get_metadata()["out_sharding"] == ("d", "a")
    assert weight.scales.get_metadata()["out_sharding"] == ("d",)


def test_products_are_those_of_the_dequantized_matrix() -> None:
    matrix = RANDOM.standard_normal((3, 16, 5, 4)).astype(np.float32)
    weight, x = declare((3, 16, 5, 4), (0, 1)), RANDOM.standard_normal((6, 3, 16))
    arrays = weight.quantize(matrix)
    weight.values[...], weight.scales[...] = (
        jnp.asarray(arrays["values"]),
        jnp.asarray(arrays["scales"]),
    )
    dequantized = arrays["values"] * arrays["scales"][:, :, None]
    dequantized = dequantized.reshape(5, 4, 3, 16).transpose(2, 3, 0, 1)
    found = weights.product(jnp.asarray(x, jnp.float32), weights.matrix(weight))
    wanted = np.tensordot(x, dequantized, 2)
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())


def test_lookups() -> None:
    table, head = declare((6, 8), (1,)), declare((8, 6), (0,))
    indices = jnp.array([3, 0, 3])
    found = weights.outputs(weights.matrix(table), indices, axis=0)
    np.testing.assert_array_equal(found, (table.values[...] * table.scales[...][:, None])[indices])
    plain = declare((8, 6), (0,), PLAIN)
    rows = weights.outputs(weights.matrix(plain), indices, axis=1)
    np.testing.assert_array_equal(rows, plain[...].T[indices])
    # Drawn alike, so the same but for half a step.
    tied = weights.outputs(weights.matrix(head), indices, axis=1)
    assert np.abs(tied - rows).max() <= 0.51 * head.scales[...].max()


def test_groups_of_rows_have_matrices_of_their_own() -> None:
    experts = weights.matrix(declare((4, 16, 6), (1,)))
    sizes, x = np.array([2, 0, 3, 1], np.int32), RANDOM.standard_normal((6, 16)).astype(np.float32)
    found = weights.grouped_product(jnp.asarray(x), experts, jnp.asarray(sizes))
    assert isinstance(experts, Int8Matrix)
    dense = experts.values * experts.scales[:, :, None]
    for row, expert in enumerate(np.repeat(np.arange(4), sizes)):
        np.testing.assert_allclose(found[row], dense[expert] @ x[row], rtol=1e-4, atol=1e-5)


def test_a_module_names_its_matrices() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.one = holder((8, 4), (0,), INT8)
            self.parts = nnx.List([holder((4, 4), (0,), INT8), nnx.Param(jnp.zeros(3))])

    found = weights.quantized_weights(Two())
    assert set(found) == {("one", "matrix"), ("parts", 0, "matrix")}
    made = found["one", "matrix"].quantize(np.ones((8, 4), np.float32))
    assert made["values"].shape == (4, 8)


def test_formats_differ_in_what_becomes_of_activations() -> None:
    forms = {n: form for n, form in weights.FORMATS.items() if isinstance(form, Int8Format)}
    activations = [(form.activation_bits, form.activation_group) for form in forms.values()]
    assert activations == [(16, None), (8, None), (8, 64)]
    for name, form in forms.items():
        assert declare((64, 4), (0,), policy_of(name)).form == form
