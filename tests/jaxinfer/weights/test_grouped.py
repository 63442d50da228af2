"""Matrices in groups of 4- or 8-bit integers: their numbers, their arrays, their axes."""

from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxinfer import weights
from jaxinfer.sharding import make_mesh, partition_spec
from jaxinfer.weights import GroupedFormat, Integers
from jaxinfer.weights.grouped import GroupedWeight
from tests.conftest import ManyDevices
from tests.jaxinfer.weights.declared import PLAIN, holder, policy_of

RANDOM = np.random.default_rng(0)
SHAPES = [((64, 5), (0,)), ((96, 2, 3, 8), (0,)), ((2, 3, 32, 20), (0, 1, 2)), ((4, 64, 6), (1,))]
NAMES = ["int4", "int4-64", "int4-symmetric"]


def draw(shape: tuple[int, ...]) -> np.ndarray:
    """Groups of very different sizes, and one of zeros."""
    sizes = 10.0 ** RANDOM.integers(-3, 3, (*shape[:-1], 1))
    matrix = (RANDOM.standard_normal(shape) * sizes).astype(np.float32)
    matrix[..., 0] = 0
    return matrix


def declared(shape: tuple[int, ...], inputs: tuple[int, ...], name: str) -> Any:
    return holder(shape, inputs, policy_of(name)).matrix


def with_form(shape: tuple[int, ...], inputs: tuple[int, ...], form: GroupedFormat) -> Any:
    axes = tuple("abcd"[: len(shape)])
    with nnx.use_eager_sharding(False):
        return GroupedWeight(jnp.zeros(shape), axes, inputs, form)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "inputs"), SHAPES)
def test_numbers_are_off_by_half_a_step_at_most(
    shape: tuple[int, ...], inputs: tuple[int, ...], name: str
) -> None:
    """Without a minimum by one, at the end that is no integer: there are 8 below zero, 7 above."""
    weight, matrix = declared(shape, inputs, name), draw(shape)
    arrays = weight.quantize(matrix)
    assert arrays["values"].dtype == np.uint8
    assert arrays["values"].nbytes * 2 == matrix.size
    assert {array.dtype.name for n, array in arrays.items() if n != "values"} == {"float16"}
    found = np.asarray(weight.dequantize({n: jnp.asarray(a) for n, a in arrays.items()}))
    assert found.shape == shape
    # The step of each group, as large as the matrix: what a step more of every integer makes.
    steps = np.abs(arrays["scales"].astype(np.float32))
    whole = np.repeat(steps, weight.form.group, axis=weight.axis).reshape(shape)
    # With a scale that had to be rounded to float16, the far end of a group may be off by more.
    most = (1 if name == "int4-symmetric" else 0.5) + 16 * 2**-11
    assert (np.abs(found - matrix) <= whole * most + 2**-24).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("int4", gguf.GGMLQuantizationType.Q4_1), ("int4-symmetric", gguf.GGMLQuantizationType.Q4_0)],
)
def test_numbers_are_about_those_of_llama_cpp(name: str, kind: Any) -> None:
    """Its quantizers round before the scale is rounded to float16, ours after."""
    matrix = RANDOM.standard_normal((256, 40)).astype(np.float32)
    weight = declared((256, 40), (0,), name)
    found = weight.dequantize({n: jnp.asarray(a) for n, a in weight.quantize(matrix).items()})
    rows = np.ascontiguousarray(matrix.T)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind).T
    ours, other = (float(np.square(x - matrix).mean()) for x in (np.asarray(found), theirs))
    assert ours <= other * 1.001
    assert np.mean(np.abs(found - theirs) > 1e-3) < 0.02


def test_what_is_on_the_grid_is_kept() -> None:
    """A matrix that had been such integers loses nothing when it is quantized again."""
    weight = declared((64, 6), (0,), "int4")
    arrays = {n: jnp.asarray(a) for n, a in weight.quantize(draw((64, 6))).items()}
    once = weight.dequantize(arrays)
    again = weight.dequantize(weight.quantize(once))
    np.testing.assert_allclose(again, once, rtol=2e-3, atol=2e-3 * float(jnp.abs(once).max()))


@pytest.mark.parametrize("name", NAMES)
def test_numpy_and_jax_make_the_same(name: str) -> None:
    weight, matrix = declared((64, 33), (0,), name), draw((64, 33))
    by_numpy, by_jax = weight.quantize(matrix), weight.quantize(jnp.asarray(matrix))
    for key, array in by_numpy.items():
        assert isinstance(array, np.ndarray)
        assert isinstance(by_jax[key], jax.Array)
        np.testing.assert_array_equal(array, by_jax[key])


def test_arrays_say_their_axes() -> None:
    def axes(shape: tuple[int, ...], inputs: tuple[int, ...], names: Any) -> Any:
        weight = holder(shape, inputs, policy_of("int4"), names).matrix
        found = {
            getattr(weight, n).get_metadata()["out_sharding"]
            for n in ("values", "scales", "minimums")
        }
        (one,) = found
        return one, weight.values[...].shape

    assert axes((64, 2, 3, 8), (0,), ("embed", "kv_heads", "heads_and_kv", "head_dim")) == (
        ("embed", "kv_heads"),
        (32, 48),
    )
    assert axes((2, 3, 32, 20), (0, 1, 2), ("kv_heads", "heads", "head_dim", "embed")) == (
        ("kv_heads", "embed"),
        (96, 20),
    )
    assert axes((64, 2, 12), (0,), ("embed", None, "ffn")) == (("embed", None, "ffn"), (32, 2, 12))
    assert axes((4, 64, 6), (1,), ("experts", None, None)) == (("experts", None, None), (4, 32, 6))
    assert axes((6, 64), (1,), ("vocab", "embed")) == (("vocab", "embed"), (6, 32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "inputs"), SHAPES[:3])
def test_products_are_those_of_the_dequantized_matrix(
    shape: tuple[int, ...], inputs: tuple[int, ...], name: str
) -> None:
    weight = declared(shape, inputs, name)
    x = RANDOM.standard_normal((6, *[shape[axis] for axis in inputs])).astype(np.float32)
    found = weights.product(jnp.asarray(x), weights.matrix(weight))
    arrays = {n: getattr(weight, n)[...] for n in weight.quantize(np.zeros(shape, np.float32))}
    wanted = np.tensordot(x, weight.dequantize(arrays), len(inputs))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", NAMES)
def test_lookups_and_groups_of_rows(name: str) -> None:
    indices = jnp.array([3, 0, 3])
    for shape, inputs, axis in (((6, 64), (1,), 0), ((64, 6), (0,), 1)):
        weight = declared(shape, inputs, name)
        found = weights.outputs(weights.matrix(weight), indices, axis=axis)
        arrays = {n: getattr(weight, n)[...] for n in weight.quantize(np.zeros(shape, np.float32))}
        whole = weight.dequantize(arrays)
        np.testing.assert_array_equal(found, whole[indices] if axis == 0 else whole[:, indices].T)
    weight = declared((4, 64, 6), (1,), name)
    arrays = {n: getattr(weight, n)[...] for n in weight.quantize(np.zeros((4, 64, 6), np.float32))}
    dense = weight.dequantize(arrays)
    sizes, x = np.array([2, 0, 3, 1], np.int32), RANDOM.standard_normal((6, 64)).astype(np.float32)
    found = weights.grouped_product(jnp.asarray(x), weights.matrix(weight), jnp.asarray(sizes))
    for row, expert in enumerate(np.repeat(np.arange(4), sizes)):
        np.testing.assert_allclose(found[row], x[row] @ dense[expert], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        GroupedFormat(4, 32),
        GroupedFormat(4, 16, "float16"),
        GroupedFormat(8, 32),
        GroupedFormat(8, 16, "float32"),
    ],
)
def test_stored_integers_stay(form: GroupedFormat) -> None:
    shape, inputs = (2, 2, 32, 10), (0, 1, 2)
    low, high = ((0, 16) if form.minimums else (-8, 8)) if form.bits == 4 else (-127, 128)
    groups = (2, 2, 32 // form.group, 10)
    values = RANDOM.integers(low, high, shape).astype(np.int8)
    scales = RANDOM.random(groups).astype(np.float16)
    minimums = RANDOM.standard_normal(groups).astype(form.minimums) if form.minimums else None
    weight = with_form(shape, inputs, form)
    arrays = weight.from_stored(Integers(values, scales, minimums))
    found = weight.dequantize({n: jnp.asarray(a) for n, a in arrays.items()})
    in_groups = values.reshape(*groups[:3], form.group, 10).astype(np.float32)
    wanted = in_groups * scales[:, :, :, None].astype(np.float32)
    if minimums is not None:
        wanted = wanted + minimums[:, :, :, None].astype(np.float32)
    np.testing.assert_allclose(found, wanted.reshape(shape), rtol=1e-6, atol=1e-6)


def test_groups_that_do_not_divide_are_made_smaller_or_refused() -> None:
    assert declared((96, 4), (0,), "int4-128").form.group == 32
    assert declared((4, 2, 16, 8), (0, 1, 2), "int4").form.group == 16
    with pytest.raises(ValueError, match=r"matrix in int4: 12 inputs are no multiple of 8"):
        declared((12, 4), (0,), "int4")
    with pytest.raises(ValueError, match="96 inputs over 2 devices are no groups of 32"):
        holder((96, 4), (0,), policy_of("int4"), ("ffn", "embed"), num_devices=2)


def products_on(num_devices: int, axes: tuple[str | None, ...]) -> np.ndarray:
    """Multiplies by an MLP's matrix whose inputs or outputs are split over devices."""
    mesh = make_mesh(jax.devices()[:num_devices])
    weight = holder((256, 64), (0,), policy_of("int4"), axes, num_devices).matrix
    sharding = NamedSharding(mesh, partition_spec(weight.values.get_metadata()["out_sharding"]))
    matrix = jax.device_put(weights.matrix(weight), sharding)
    assert len(matrix.values.sharding.device_set) == num_devices
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 256)), jnp.float32)
    return np.asarray(jax.jit(weights.product)(x, matrix))


@pytest.mark.parametrize("axes", [("ffn", "embed"), ("embed", "ffn")])
def test_eight_devices_multiply_as_one(
    many_devices: ManyDevices, axes: tuple[str | None, ...]
) -> None:
    one = products_on(1, axes)
    np.testing.assert_allclose(many_devices(products_on, 8, axes), one, rtol=1e-4, atol=1e-4)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match=r"no format 'int3' of matrices; there are int8, "):
        declared((64, 4), (0,), "int3")
    assert isinstance(weights.matrix(holder((64, 4), (0,), PLAIN).matrix), jax.Array)
