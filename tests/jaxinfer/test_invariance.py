"""A row's bits do not depend on what else is in the step, on chunking or on recomputation.

The logits of one token are compared bit for bit over every arrangement that a scheduler can make,
on a model with the default model's layer shapes.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxinfer import models, step
from jaxinfer.batch import BatchShape, Packer, unpack
from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.request import Request
from jaxinfer.schedule import Schedule, ScheduledSequence
from jaxinfer.sharding import abstract_parameters, make_mesh
from jaxinfer.step_state import StepState, abstract_state
from tests.jaxinfer.tiny import CPU_DTYPES, tiny_model
from tests.thorough import thorough_beyond

CONFIG = EngineConfig(
    max_num_seqs=16, max_num_batched_tokens=256, max_model_len=512, page_size=16, num_pages=256
)
MODEL = tiny_model(
    vocab_size=4096,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=3,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
)
TOKENS = tuple(int(t) for t in np.random.RandomState(0).randint(0, MODEL.vocab_size, 300))
LENGTH = 190  # across a block of 128 tokens and inside a page


@dataclass
class Probe:
    """Runs schedules and returns the logits row of the first sequence."""

    model: ModelConfig = MODEL
    dtypes: DtypePolicy = CPU_DTYPES
    programs: dict[BatchShape, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph, state = models.abstract(self.model, self.dtypes)
        mesh = make_mesh(jax.devices("cpu")[:1])
        self.parameters_shape = abstract_parameters(state, mesh)
        self.state_shape = abstract_state(EngineSpec(self.model, CONFIG, self.dtypes, mesh))
        full = models.build(self.model, self.dtypes, nnx.Rngs(0))
        self.parameters = jax.device_put(nnx.to_pure_dict(nnx.state(full)))
        self.reset()

    def reset(self) -> None:
        """Empty pages with junk in them: stale content must not matter."""
        self.state = jax.tree.map(
            lambda leaf: jax.numpy.full(leaf.shape, 3, leaf.dtype), self.state_shape
        )

    def run(
        self, shape: BatchShape, decodes: list[tuple[int, int]], chunks: list[tuple[int, int, int]]
    ) -> np.ndarray:
        """``decodes`` (slot, position), ``chunks`` (slot, start, count): logits [R, V]."""
        schedule = Schedule(
            decodes=tuple(self._sequence(slot, at, 1, is_chunk=False) for slot, at in decodes),
            chunks=tuple(self._sequence(*chunk, is_chunk=True) for chunk in chunks),
        )
        # Each decode finds its token and its position in the device state.
        tokens = np.tile(np.resize(TOKENS, CONFIG.max_model_len), (CONFIG.max_num_seqs, 1))
        lens = np.zeros(CONFIG.max_num_seqs, np.int32)
        for slot, at in decodes:
            lens[slot] = at
        self.state = dataclasses.replace(
            self.state,
            tokens=jax.numpy.asarray(tokens, "int32"),
            lens=jax.numpy.asarray(lens),
            has_ended=jax.numpy.zeros(CONFIG.max_num_seqs, bool),
        )
        packed, _ = Packer(CONFIG).pack(schedule, shape)
        if shape not in self.programs:
            self.programs[shape] = self._compile(shape, packed)
        self.state, logits = self.programs[shape](self.parameters, self.state, packed)
        return np.asarray(logits)

    def _sequence(self, slot: int, start: int, count: int, is_chunk: bool) -> ScheduledSequence:
        tokens = np.resize(TOKENS, CONFIG.max_model_len)[start : start + count].tolist()
        return ScheduledSequence(
            request=Request(str(slot), (1,), max_tokens=1),
            choice=0,
            slot=slot,
            admission=0,
            start=start,
            num_tokens=count,
            page_ids=tuple(range(slot * 14, slot * 14 + 14)),
            samples=True,
            token_ids=tuple(tokens) if is_chunk else (),
        )

    def _compile(self, shape: BatchShape, packed: np.ndarray) -> Any:
        def program(parameters: Any, state: StepState, packed: Any) -> Any:
            model = nnx.merge(self.graph, parameters)
            batch = unpack(packed, shape, CONFIG)
            hidden, _, state = step.forward(model, state, batch, CONFIG)
            return state, model.logits(hidden)

        jitted = jax.jit(program, donate_argnums=1)
        lowered = jitted.lower(self.parameters_shape, self.state_shape, packed)
        return lowered.compile(compiler_options=step.compiler_options("cpu", self.dtypes))

    def prefill(self, num_tiles: int) -> np.ndarray:
        """The sequence in slot 0, in chunks of ``num_tiles`` tiles; logits of its last token."""
        self.reset()
        shape, size = BatchShape(8, num_tiles), num_tiles * CONFIG.chunk_tile
        last = np.zeros(0)
        for start in range(0, LENGTH, size):
            count = min(size, LENGTH - start)
            last = self.run(shape, [], [(0, start, count)])[shape.num_decodes + count - 1]
        return last

    def pages(self) -> list[np.ndarray]:
        """Keys and values of slot 0's first 176 tokens (whole pages), by layer."""
        return [np.asarray(pages[:11]) for pages in jax.tree.leaves(self.state.kv_pages)]


@functools.cache
def probe() -> Probe:
    """Compiled programs are shared by the tests of this file."""
    return Probe()


def test_chunking_does_not_matter() -> None:
    one_chunk = probe().prefill(4)
    pages = probe().pages()
    for tiles in (1, 2):
        np.testing.assert_array_equal(probe().prefill(tiles), one_chunk)
        for ours, theirs in zip(probe().pages(), pages, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "neighbours", "chunks"),
    [
        (BatchShape(8, 0), 3, []),
        (BatchShape(16, 0), 0, []),
        (BatchShape(16, 0), 15, []),
        (BatchShape(8, 1), 0, [(9, 0, 40)]),
        (BatchShape(16, 4), 7, [(9, 0, 64), (10, 64, 128)]),
    ],
)
def test_neighbours_of_a_decode_do_not_matter(
    shape: BatchShape, neighbours: int, chunks: list[tuple[int, int, int]]
) -> None:
    probe().prefill(4)
    alone = probe().run(BatchShape(8, 0), [(0, LENGTH)], [])[0]
    slots = [slot for slot in range(1, 16) if slot not in {chunk[0] for chunk in chunks}]
    decodes = [(slot, 17 * slot % 200) for slot in slots[:neighbours]]
    decodes.insert(neighbours // 2, (0, LENGTH))
    logits = probe().run(shape, decodes, chunks)[neighbours // 2]
    np.testing.assert_array_equal(logits, alone)


@pytest.mark.parametrize("start", [0, 64, 128, 160])
def test_recomputation_inside_a_chunk_equals_the_decode(start: int) -> None:
    probe().prefill(4)
    decoded = probe().run(BatchShape(8, 0), [(0, LENGTH)], [])[0]
    probe().prefill(4)
    shape = BatchShape(8, 4)
    logits = probe().run(shape, [], [(0, start, LENGTH + 1 - start)])
    np.testing.assert_array_equal(logits[shape.num_decodes + LENGTH - start], decoded)


SHAPES = [
    (4, 4, 64, 512, 1536),
    (8, 1, 32, 256, 512),
    (32, 8, 64, 2048, 5632),
    (14, 2, 64, 896, 4864),
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "embed", "ffn"),
    thorough_beyond([], SHAPES, "invariance of larger models"),
)
def test_other_shapes(heads: int, kv_heads: int, head_dim: int, embed: int, ffn: int) -> None:
    """Without grouping, with one kv head, and the layers of larger models."""
    other = Probe(
        tiny_model(
            vocab_size=1024,
            hidden_size=embed,
            intermediate_size=ffn,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
        )
    )
    check_arrangements(other)


@pytest.mark.parametrize(
    "quantization",
    thorough_beyond([], ["int8", "int8-dynamic-64", "int4"], "invariance of more formats"),
)
def test_quantized_matrices(quantization: str) -> None:
    """Sums of integers, and floats that integers stand for; attention stays as it is."""
    check_arrangements(Probe(dtypes=dataclasses.replace(CPU_DTYPES, quantization=quantization)))


@pytest.mark.parametrize(
    "kv_cache", thorough_beyond(["int8"], ["int8", "fp8"], "invariance of more formats")
)
def test_quantized_pages(kv_cache: str) -> None:
    """A row's keys and values are rounded by themselves, wherever it stands."""
    check_arrangements(Probe(dtypes=dataclasses.replace(CPU_DTYPES, kv_cache=kv_cache)))


def check_arrangements(other: Probe) -> None:
    """In chunks or whole, alone or beside others, decoded or computed again: the same bits."""
    one_chunk = other.prefill(4)
    np.testing.assert_array_equal(other.prefill(1), one_chunk)
    alone = other.run(BatchShape(8, 0), [(0, LENGTH)], [])[0]
    other.prefill(4)
    beside = other.run(BatchShape(16, 4), [(3, 20), (0, LENGTH)], [(9, 0, 64), (10, 64, 128)])[1]
    np.testing.assert_array_equal(beside, alone)
    shape = BatchShape(8, 4)
    recomputed = other.run(shape, [], [(0, 64, LENGTH + 1 - 64)])[shape.num_decodes + LENGTH - 64]
    np.testing.assert_array_equal(recomputed, alone)


def test_without_the_compiler_option_rows_differ() -> None:
    """The test above can fail: XLA:CPU's default kernels break the promise."""
    plain = Probe()
    options, step.compiler_options = step.compiler_options, lambda platform, dtypes: {}
    try:
        plain.prefill(4)
        alone = plain.run(BatchShape(8, 0), [(0, LENGTH)], [])[0]
        plain.prefill(4)
        again = plain.run(BatchShape(8, 4), [(0, LENGTH)], [(9, 64, 128)])[0]
    finally:
        step.compiler_options = options
    assert not np.array_equal(alone, again)
    np.testing.assert_allclose(alone, again, atol=1e-4)
