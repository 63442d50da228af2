"""A loaded model in other weight formats, and what each changes: logits beside logits."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints.load import load_parameters
from checkpoints.stored import require_stored_formats
from jaxinfer import models, step
from jaxinfer.batch import MIN_DECODE_ROWS, BatchShape, Packer, unpack
from jaxinfer.config import STORED, DtypePolicy, EngineConfig
from jaxinfer.models import quantized_weights
from jaxinfer.request import Request
from jaxinfer.schedule import Schedule, ScheduledSequence
from jaxinfer.sharding import abstract_parameters, num_tensor_devices, place
from jaxinfer.step import Parameters
from jaxinfer.step_state import StepState, abstract_state
from jaxinfer_entrypoints.benchmarks.measuring import measure, random_prompts, requests_of
from jaxinfer_entrypoints.loading.assembly import LoadedModel, new_engine

# Name of a format, in tables, of matrices that are not quantized.
PLAIN = "none"
# Prompt rows of a step: their logits over a vocabulary of 150,000 are 80 MB for each format.
TILES = 2
# Sequences that decode at once while speed is measured, and their new tokens.
BATCHES, PROMPT_TOKENS, NEW_TOKENS = (1, 8, 32), 16, 24
# What else can be compared: KV pages in other dtypes, beside plain matrices.
KV_FORMATS = {"kv-int8": "int8", "kv-fp8": "fp8"}


def in_format(loaded: LoadedModel, name: str) -> LoadedModel:
    """``loaded``, which is plain, with matrices or KV pages in the format called ``name``.

    Both are held. The engine is the plain one still: make a new one.
    """
    if name == PLAIN:
        return loaded
    if name in KV_FORMATS:
        dtypes = dataclasses.replace(loaded.spec.dtypes, kv_cache=KV_FORMATS[name])
        return dataclasses.replace(loaded, spec=dataclasses.replace(loaded.spec, dtypes=dtypes))
    formats = require_stored_formats(loaded.name, loaded.checkpoint) if name == STORED else ()
    dtypes = dataclasses.replace(loaded.spec.dtypes, quantization=name, matrix_formats=formats)
    spec = dataclasses.replace(loaded.spec, dtypes=dtypes)
    _, state = models.abstract(spec.model, dtypes, spec.mesh)
    abstract = abstract_parameters(state, spec.mesh)
    made = quantized_weights(spec.model, dtypes, spec.mesh)
    if name == STORED:
        parameters = load_parameters(
            loaded.checkpoint, abstract, None, num_tensor_devices(spec.mesh), made, stored=True
        )
        return dataclasses.replace(loaded, spec=spec, parameters=parameters)

    def quantize(tree: Any, path: tuple[Any, ...]) -> Any:
        if path in made:
            return dict(jax.jit(made[path].quantize)(tree))
        if isinstance(tree, Mapping):
            return {key: quantize(value, (*path, key)) for key, value in tree.items()}
        return tree

    parameters = jax.tree.map(place, quantize(loaded.parameters, ()), abstract)
    return dataclasses.replace(loaded, spec=spec, parameters=parameters)


def weight_bytes(parameters: Parameters) -> int:
    """Bytes of all parameters, scales among them."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))


@dataclass
class Quality:
    """Sums over predicted tokens, in nats; ``max_kl`` of one token."""

    nll: float = 0.0
    kl: float = 0.0
    max_kl: float = 0.0
    num_equal_tops: int = 0
    num_tokens: int = 0

    def add(self, logits: jax.Array, plain: jax.Array, targets: np.ndarray) -> None:
        """``logits`` and those of the plain model, [n, V], where ``targets`` [n] came next."""
        losses, divergences, equal = _compare(logits, plain, jnp.asarray(targets))
        self.nll += float(losses.sum())
        self.kl += float(divergences.sum())
        self.max_kl = max(self.max_kl, float(divergences.max()))
        self.num_equal_tops += int(equal.sum())
        self.num_tokens += len(targets)


def compare_formats(
    loaded: LoadedModel, names: Sequence[str], token_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each format, the plain one first, on a text and at decoding random prompts.

    ``nll`` and ``kl`` are means over predicted tokens, the divergence that of the plain model's
    distribution from the format's, D(plain || format).
    """
    formats = {name: in_format(loaded, name) for name in (PLAIN, *names)}
    qualities = {name: Quality() for name in formats}
    streams = [_logits(variant, token_ids) for variant in formats.values()]
    for parts in zip(*streams, strict=True):
        targets, plain = parts[0]
        for quality, (_, logits) in zip(qualities.values(), parts, strict=True):
            quality.add(logits, plain, targets)
    plain_bytes = weight_bytes(loaded.parameters)
    rows = []
    for name, variant in formats.items():
        quality, num_bytes = qualities[name], weight_bytes(variant.parameters)
        nll = quality.nll / quality.num_tokens
        rows.append(
            {
                "weights": loaded.spec.dtypes.weights if name == PLAIN else name,
                "weight_mib": round(num_bytes / 2**20, 1),
                "of_plain": round(num_bytes / plain_bytes, 4),
                "nll": nll,
                "perplexity": math.exp(nll),
                "mean_kl": quality.kl / quality.num_tokens,
                "max_kl": quality.max_kl,
                "top1_agreement": quality.num_equal_tops / quality.num_tokens,
                **_rates(variant),
            }
        )
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text; the loss beside the plain one's."""
    rates = [f"tok/s x{size}" for size in BATCHES]
    heads = ["weights", "MiB", "NLL", "", "perplexity", "KL mean", "max", "top 1", *rates]
    lines = [heads]
    for row in rows:
        change = row["nll"] / rows[0]["nll"] - 1
        lines.append(
            [
                row["weights"],
                f"{row['weight_mib']:.1f}",
                f"{row['nll']:.5f}",
                f"{change:+.2%}",
                f"{row['perplexity']:.4f}",
                f"{row['mean_kl']:.5f}",
                f"{row['max_kl']:.3f}",
                f"{row['top1_agreement']:.2%}",
                *(f"{row[f'decode_tokens_per_second_{size}']:.1f}" for size in BATCHES),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


@jax.jit
def _compare(
    logits: jax.Array, plain: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[n] each: nats of the targets, D(plain || logits), whether both have one favourite."""
    ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(plain)
    losses = -jnp.take_along_axis(ours, targets[:, None], axis=1)[:, 0]
    divergences = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=1)
    return losses, divergences, jnp.argmax(ours, axis=1) == jnp.argmax(theirs, axis=1)


def _rates(variant: LoadedModel) -> dict[str, float]:
    """Decoded tokens a second, by the number of sequences."""
    tiles, rows = variant.spec.config.tile_counts[-1], (MIN_DECODE_ROWS, max(BATCHES))
    shapes = [*(BatchShape(n, 0) for n in rows), BatchShape(rows[-1], tiles)]
    engine = new_engine(variant, shapes, max_num_seqs=rows[-1])
    rates = {}
    for size in BATCHES:
        prompts = random_prompts(variant.spec.model.num_tokens, [PROMPT_TOKENS] * size)
        measure(engine, requests_of(prompts, 4))
        measured = measure(engine, requests_of(prompts, NEW_TOKENS))
        rate = measured.decode_tokens / measured.decode_seconds
        rates[f"decode_tokens_per_second_{size}"] = round(rate, 2)
    return rates


def _logits(
    variant: LoadedModel, token_ids: Sequence[int]
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Next tokens [n] and the logits [n, V] before them, a step at a time, in windows that do not
    overlap, as ``evaluate.py`` has them.
    """
    config = dataclasses.replace(
        variant.spec.config,
        max_num_seqs=1,
        max_num_batched_tokens=TILES * variant.spec.config.chunk_tile,
        num_pages=variant.spec.config.max_pages_per_sequence,
    )
    shape, size = BatchShape(MIN_DECODE_ROWS, TILES), config.max_num_batched_tokens
    program = _program(variant, config, shape)
    packer, window = Packer(config), config.max_model_len - 1
    abstract = abstract_state(dataclasses.replace(variant.spec, config=config, draft=None))
    state = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )()
    for first in range(0, len(token_ids) - 1, window):
        tokens = tuple(token_ids[first : first + window])
        for start in range(0, len(tokens), size):
            chunk = ScheduledSequence(
                request=Request("text", (1,), max_tokens=1),
                choice=0,
                slot=0,
                admission=0,
                start=start,
                num_tokens=len(tokens[start : start + size]),
                page_ids=tuple(range(config.max_pages_per_sequence)),
                samples=False,
                token_ids=tokens[start : start + size],
            )
            packed, _ = packer.pack(Schedule(chunks=(chunk,)), shape)
            state, logits = program(variant.parameters, state, packed)
            targets = np.asarray(tokens[start + 1 : start + size + 1], np.int32)
            if len(targets):
                yield targets, logits[: len(targets)]


def _program(variant: LoadedModel, config: EngineConfig, shape: BatchShape) -> Any:
    """(parameters, state, packed) -> the state, and the logits of all prompt rows."""
    dtypes: DtypePolicy = variant.spec.dtypes
    mesh = variant.engine.spec.mesh
    graph, _ = models.abstract(variant.spec.model.served(config.max_model_len), dtypes, mesh)

    def run(parameters: Any, state: StepState, packed: jax.Array) -> Any:
        model = nnx.merge(graph, parameters)
        hidden, _, state = step.forward(model, state, unpack(packed, shape, config), config)
        return state, model.logits(hidden[shape.num_decodes :])

    options = step.compiler_options(mesh.devices.flat[0].platform, dtypes, config.batch_invariant)
    jitted = jax.jit(run, donate_argnums=1, compiler_options=options)

    def call(parameters: Any, state: StepState, packed: Any) -> Any:
        with jax.set_mesh(mesh):
            return jitted(parameters, state, packed)

    return call
