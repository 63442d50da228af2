"""Additions are one module and one entry of a table: each is added here, and used."""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.checkpoint import Checkpoint, Quantization
from checkpoints.converted.convert import Rounding, convert
from checkpoints.converted.quantization import quantization_from_json, quantization_to_json
from checkpoints.load import load_parameters, open_checkpoint
from jaxinfer import models
from jaxinfer.config import STORED, DtypePolicy
from jaxinfer.engine import Engine
from jaxinfer.models import llama
from jaxinfer.sharding import abstract_parameters
from jaxinfer.weights import formats
from jaxinfer.weights.integers import Integers
from jaxinfer.weights.protocol import Format, QuantizedMatrix, QuantizedWeight
from jaxinfer.weights.recorded import float_product
from pallas_kernels import quantized_matmul, ragged_paged_attention
from pallas_kernels.quantized_matmul import xla as matmul_xla
from pallas_kernels.ragged_paged_attention import reference
from tests.checkpoints.converted.test_checkpoint import Source
from tests.jaxinfer.tiny import (
    CPU_DTYPES,
    random_parameters,
    random_request,
    run_all,
    tiny_config,
    tiny_model,
    tiny_spec,
)

REQUESTS = [random_request("a", 30, 6, seed=1), random_request("b", 5, 6, seed=2)]


@functools.cache
def tokens(attention: str | None = None, architecture: str = "llama") -> Any:
    """Runs ``REQUESTS`` on an engine of random weights."""
    model = tiny_model(architecture=architecture)
    engine = Engine(tiny_spec(tiny_config(attention=attention), model))
    engine.compile(shapes=engine.shapes[-1:])
    engine.start(jax.device_put(random_parameters(tiny_model())))
    return run_all(engine, REQUESTS)


class OwnPages(NamedTuple):
    """Pages of a form that no other backend has."""

    inner: reference.LogicalKVPages


def attention_backend(calls: list[int]) -> ModuleType:
    """The one file: a backend that keeps the reference's pages in a form of its own."""
    module: Any = ModuleType("own")
    module.PLATFORMS = None
    module.abstract_kv_pages = lambda *sizes: OwnPages(reference.abstract_kv_pages(*sizes))

    def attend(queries: Any, keys: Any, values: Any, kv_pages: Any, batch: Any, **rest: Any) -> Any:
        if not isinstance(kv_pages, OwnPages):
            raise NotImplementedError("pages of another backend")
        calls.append(len(queries))
        outputs, inner = reference.ragged_paged_attention(
            queries, keys, values, kv_pages.inner, batch, **rest
        )
        return outputs, OwnPages(inner)

    module.ragged_paged_attention = attend
    return module


def test_an_attention_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, calls = tokens(), list[int]()
    table = cast(dict[str, Any], ragged_paged_attention.IMPLEMENTATIONS)
    monkeypatch.setitem(table, "own", attention_backend(calls))  # the one line
    assert tokens("own") == expected
    assert calls


def test_a_matmul_backend_for_one_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("own")
    calls = list[int]()
    module.PLATFORMS = frozenset({"cpu"})

    def multiply(inputs: Any, values: Any, scales: Any, **options: Any) -> Any:
        calls.append(len(inputs))
        return 2 * matmul_xla.int8_matmul(inputs, values, scales, **options)

    module.int8_matmul = multiply
    random = np.random.default_rng(0)
    inputs = jnp.asarray(random.normal(size=(8, 32)), jnp.float32)
    values = jnp.asarray(random.integers(-127, 128, (16, 32)), jnp.int8)
    scales = jnp.ones(16, jnp.float32)

    def product(inputs: jax.Array) -> jax.Array:
        return quantized_matmul.int8_matmul(inputs, values, scales, activation_bits=16)

    expected = product(inputs)
    table = {
        "own": module,
        **quantized_matmul.IMPLEMENTATIONS,
    }  # the one line, the first to be asked
    monkeypatch.setattr(quantized_matmul, "IMPLEMENTATIONS", table)
    np.testing.assert_array_equal(jax.jit(product)(inputs), 2 * expected)
    assert calls
    assert "cpu" in quantized_matmul.kernel_platforms()
    # Elsewhere than it says, it is not in the program.
    of_tpu = jax.jit(product).trace(inputs).lower(lowering_platforms=("tpu",)).as_text()
    monkeypatch.undo()
    assert of_tpu == jax.jit(product).trace(inputs).lower(lowering_platforms=("tpu",)).as_text()


def test_a_model_family(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens()
    module: Any = ModuleType("jaxinfer.models.own")
    module.FAMILY = llama.FAMILY
    monkeypatch.setitem(sys.modules, "jaxinfer.models.own", module)  # the one file
    table = cast(dict[str, str], models.ARCHITECTURES)
    monkeypatch.setitem(table, "own", "own")  # the one line
    assert tokens(architecture="own") == expected


@dataclass(frozen=True)
class HalfFormat(Format):
    """Half of each number, in a float dtype: a format that no other looks like."""

    dtype: str = "float32"

    def weight(self, matrix: Any, axes: Any, inputs: Any) -> "HalfWeight":
        return HalfWeight(matrix, axes, inputs, self)


class HalfWeight(QuantizedWeight):
    """``halves`` in place of a matrix, in its own axes."""

    def __init__(self, matrix: Any, axes: Any, inputs: Any, form: HalfFormat) -> None:
        self.form, self.shape, self.inputs = form, tuple(matrix.shape), inputs
        self.halves = nnx.Param(self.quantize(matrix)["halves"], out_sharding=axes)

    def quantize(self, matrix: Any) -> Any:
        return {"halves": (matrix / 2).astype(self.form.dtype)}

    def dequantize(self, arrays: Any) -> Any:
        return 2 * arrays["halves"]

    def from_stored(self, parts: Integers) -> Any:
        return self.quantize(parts.values * parts.scales)

    def integers(self, arrays: Any) -> Integers:
        doubled = 2 * arrays["halves"]
        return Integers(np.sign(doubled).astype(np.int8), abs(doubled))

    @property
    def matrix(self) -> "HalfMatrix":
        return HalfMatrix(self.halves[...], self.inputs)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("halves",), meta_fields=("inputs",)
)
@dataclass(frozen=True)
class HalfMatrix(QuantizedMatrix):
    """Multiplies with twice its halves, which is exact."""

    halves: jax.Array
    inputs: tuple[int, ...]

    def product(self, inputs: jax.Array) -> jax.Array:
        matrix = 2 * self.halves
        return float_product(inputs, matrix.T if self.inputs == (1,) else matrix)

    def grouped_product(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, 2 * self.halves, sizes)

    def outputs(self, indices: jax.Array) -> jax.Array:
        of_inputs = self.halves.T if self.inputs == (0,) else self.halves
        return 2 * of_inputs[indices]


def loaded(source: Checkpoint, dtypes: DtypePolicy) -> Any:
    """Returns the parameters of ``source`` in the formats of ``dtypes``, on one device."""
    spec = tiny_spec(None, source.model, dtypes)
    _, state = models.abstract(spec.model, dtypes, spec.mesh)
    abstract = abstract_parameters(state, spec.mesh)
    made = models.quantized_weights(spec.model, dtypes, spec.mesh)
    return load_parameters(source, abstract, quantized=made)


def test_a_weight_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From its name by a converted folder to tokens, which halving and doubling keep."""
    table = cast(dict[str, Format], formats.FORMATS)
    monkeypatch.setitem(table, "half", HalfFormat())  # the one line; this file is the other
    several = Quantization(STORED, ((("lm_head",), HalfFormat("float16")),))
    assert quantization_from_json(quantization_to_json(several)) == several

    source, exact = Source("qwen3"), CPU_DTYPES
    half = dataclasses.replace(exact, quantization="half")
    folder = tmp_path / "half"
    convert(source, folder, np.dtype(np.float32), {}, None, Rounding(Quantization("half")))
    floats, halves = loaded(source, exact), loaded(open_checkpoint(folder), half)
    np.testing.assert_array_equal(halves["lm_head"]["halves"], floats["lm_head"] / 2)

    # Converted folders go by it from heads as they are to heads of several devices.
    weight = HalfWeight(jnp.asarray([[1.5, -2.0]]), None, (1,), HalfFormat())
    arrays = {"halves": np.array([[0.75, -1]], np.float32)}
    np.testing.assert_array_equal(
        weight.from_stored(weight.integers(arrays))["halves"], [[0.75, -1]]
    )

    def answers(dtypes: DtypePolicy, parameters: Any) -> Any:
        engine = Engine(tiny_spec(tiny_config(), source.model, dtypes))
        engine.compile(shapes=engine.shapes[-1:])
        engine.start(parameters)
        return run_all(engine, REQUESTS)

    assert answers(half, halves) == answers(exact, floats)
