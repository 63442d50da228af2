"""Weights rounded to 4 bits with a text in view: layer by layer, each given what the rounded layers
before it make of the text.

A package that does this, qwix, was read first and not taken: docs/quantization.md says why.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints.calibration.awq import input_factors
from checkpoints.calibration.gptq import gptq
from jaxinfer import models
from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.weights import (
    FORMATS,
    Format,
    GroupedFormat,
    MatrixPath,
    QuantizedWeight,
    record_rows,
)
from jaxinfer.weights.grouped import GroupedWeight
from pallas_kernels.ragged_paged_attention import QueryTiles, RaggedBatch, abstract_kv_pages

__all__ = ["CALIBRATED", "METHODS", "WINDOW", "Calibration", "Method", "calibrate", "check_formats"]

Method = Literal["gptq", "awq", "awq-gptq"]
METHODS: tuple[Method, ...] = ("gptq", "awq", "awq-gptq")

# Names of the formats there are two ways to round to.
CALIBRATED = tuple(name for name, form in FORMATS.items() if isinstance(form, GroupedFormat))

_FLOATS = DtypePolicy("float32", "float32", "float32")
_TILE, _PAGE = 64, 16

Arrays = Mapping[str, np.ndarray]
# Tokens that see each other; a text is cut into as many windows as it fills.
WINDOW = 512


@dataclass(frozen=True)
class Calibration:
    """A method of rounding and the tokens of a text, which both must be given."""

    method: Method
    token_ids: Sequence[int]


def check_formats(formats: Iterable[Format]) -> None:
    """Raises ``ValueError`` for formats that calibration has nothing to choose in."""
    if not all(isinstance(form, GroupedFormat) and form.bits == 4 for form in formats):
        raise ValueError(f"calibration is for matrices of 4 bits: {', '.join(CALIBRATED)}")


def calibrate(
    model: ModelConfig,
    parameters: Mapping[MatrixPath, np.ndarray],
    quantized: Mapping[MatrixPath, QuantizedWeight],
    calibration: Calibration,
    progress: Callable[[int, int], None] | None = None,
) -> dict[MatrixPath, np.ndarray | Arrays]:
    """``parameters``, those in ``quantized`` as the arrays of their formats.

    ``parameters`` are float32 in logical shapes. Layers are rounded one after the other, each for
    what the rounded ones before it make of the text; within one all matrices see what the unrounded
    others make. Rounded to the nearest are experts, since each sees few of the rows, and embeddings
    that are no head, for no product sums over them. With "awq" norms and the outputs of ``up``
    change too, by what their matrices' inputs are multiplied with; inputs that come from values
    stay, for several query heads share them.
    ``progress(done, total)`` counts layers and the head. Raises ``ValueError`` for a text of less
    than a tile, and for formats that are not of 4 bits.
    """
    check_formats(weight.form for weight in quantized.values())
    method, token_ids = calibration.method, calibration.token_ids
    num_tokens = min(WINDOW, len(token_ids)) // _TILE * _TILE
    if not num_tokens:
        raise ValueError(
            f"the text to calibrate with has {len(token_ids)} tokens, at least {_TILE} are needed"
        )
    windows = np.asarray(token_ids[: len(token_ids) // num_tokens * num_tokens], np.int32)
    windows = windows.reshape(-1, num_tokens)
    served = model.served(num_tokens)
    graph, _ = models.abstract(served, _FLOATS)
    decoder: Decoder = nnx.merge(graph, _nested(parameters))
    batch = _batch(*windows.shape)
    pages = abstract_kv_pages(
        jax.devices()[0].platform,
        batch.page_table.size,
        _PAGE,
        served.num_key_value_heads,
        served.head_dim,
        jnp.float32,
    )
    made: dict[MatrixPath, Any] = dict(parameters)
    x = decoder.embed(jnp.asarray(windows.reshape(-1)))
    ropes = decoder.ropes(batch.positions())
    for number, (layer, rope) in enumerate(zip(decoder.layers, ropes, strict=True)):
        prefix = ("layers", number)
        within = {path[2:]: weight for path, weight in quantized.items() if path[:2] == prefix}
        x, arrays = _calibrate_layer(layer, within, method, (x, rope, pages, batch))
        made |= {(*prefix, *path): array for path, array in arrays.items()}
        if progress:
            progress(number + 1, model.num_hidden_layers + 1)
    head: MatrixPath = ("lm_head",)
    made |= _calibrate(
        {path: parameters[path] for path in (head, ("norm",))},
        {} if model.tie_word_embeddings else {head: "norm"},
        {head: quantized[head]},
        method,
        {head: decoder.normed(x)},
    )
    if progress:
        progress(model.num_hidden_layers + 1, model.num_hidden_layers + 1)
    for path, weight in quantized.items():
        if not isinstance(made[path], Mapping):
            made[path] = weight.quantize(np.asarray(made[path]))
    return made


def _calibrate_layer(
    layer: Any,
    quantized: Mapping[MatrixPath, QuantizedWeight],
    method: Method,
    inputs: tuple[Any, ...],
) -> tuple[jax.Array, dict[MatrixPath, Any]]:
    """Returns the rounded layer's outputs of ``inputs``, and all its parameters by paths within."""
    graph, state = nnx.split(layer)
    parameters = _flat(nnx.to_pure_dict(state))
    rows = _run(graph, state, *inputs)[1]
    made = _calibrate(parameters, layer.norms, quantized, method, rows)
    rounded = {
        path: quantized[path].dequantize(arrays) if path in quantized else arrays
        for path, arrays in made.items()
    }
    return _run(graph, _nested(rounded), *inputs)[0], made


def _calibrate(
    parameters: Mapping[MatrixPath, Any],
    norms: Mapping[MatrixPath, str],
    quantized: Mapping[MatrixPath, QuantizedWeight],
    method: Method,
    rows: Mapping[MatrixPath, jax.Array],
) -> dict[MatrixPath, Any]:
    """``parameters`` of a layer, those in ``quantized`` as arrays; ``rows`` are what they see."""
    made = {path: jnp.asarray(array) for path, array in parameters.items()}
    seen = dict(rows)
    if "awq" in method:
        _scale_inputs(norms, quantized, made, seen)
    arrays: dict[MatrixPath, Any] = {}
    for path, weight in quantized.items():
        if "gptq" in method and path in seen:
            assert isinstance(weight, GroupedWeight)
            arrays[path] = gptq(weight, made[path], seen[path])
        else:
            arrays[path] = dict(jax.jit(weight.quantize)(made[path]))
    return jax.tree.map(np.asarray, made | arrays)


def _scale_inputs(
    norms: Mapping[MatrixPath, str],
    quantized: Mapping[MatrixPath, QuantizedWeight],
    parameters: dict[MatrixPath, Any],
    rows: dict[MatrixPath, jax.Array],
) -> None:
    """Moves AWQ's factors into norms and the outputs of ``up``; all in ``parameters``."""

    def scale(path: MatrixPath) -> jax.Array:
        factors = input_factors(quantized[path], parameters[path], rows[path])
        by_input = factors.reshape(-1, *[1] * (parameters[path].ndim - 1))
        parameters[path] = parameters[path] * by_input
        rows[path] = rows[path] / factors[None]
        return factors

    up, down = ("mlp", "gate_up"), ("mlp", "down_proj")
    if down in rows:
        factors = scale(down)
        parameters[up] = parameters[up].at[:, 1].divide(factors[None])
    for path, norm in norms.items():
        if path in rows:
            parameters[(norm,)] = parameters[(norm,)] / scale(path)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    graph: nnx.GraphDef[Any], parameters: Any, x: jax.Array, rope: Any, pages: Any, batch: Any
) -> tuple[jax.Array, dict[MatrixPath, jax.Array]]:
    """A layer's result, and the rows that its matrices were multiplied with."""
    layer = nnx.merge(graph, parameters)
    recorded = record_rows(layer)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), pages)
    x, _ = layer(x, rope, empty, batch)
    return x, {path: jnp.concatenate(rows) for path, rows in recorded.items()}


def _batch(num_sequences: int, num_tokens: int) -> RaggedBatch:
    """Prompts side by side, all in one step."""
    tiles, pages = num_tokens // _TILE, num_tokens // _PAGE
    num_tiles = num_sequences * tiles
    none = jnp.zeros(0, jnp.int32)
    return RaggedBatch(
        page_table=jnp.arange(num_sequences * pages, dtype=jnp.int32).reshape(-1, pages),
        decodes=QueryTiles(none, none, none, rows=1),
        chunks=QueryTiles(
            sequences=jnp.repeat(jnp.arange(num_sequences, dtype=jnp.int32), tiles),
            starts=jnp.tile(jnp.arange(tiles, dtype=jnp.int32) * _TILE, num_sequences),
            lens=jnp.full(num_tiles, _TILE, jnp.int32),
            rows=_TILE,
        ),
    )


def _flat(tree: Any, prefix: MatrixPath = ()) -> dict[MatrixPath, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        path: leaf
        for key, value in tree.items()
        for path, leaf in _flat(value, (*prefix, key)).items()
    }


def _nested(leaves: Mapping[MatrixPath, Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for (*keys, last), leaf in leaves.items():
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
