"""Tensor parallelism: the shapes it gives, what the devices exchange, and the same numbers."""

import collections
import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer import models
from jaxinfer.config import ModelConfig
from jaxinfer.kv_cache import abstract_kv_pages
from jaxinfer.sharding import (
    abstract_parameters,
    explain_heads,
    make_mesh,
    named_sharding,
    physical_model,
    physical_parameter,
)
from pallas_kernels.ragged_paged_attention import QueryTiles, RaggedBatch
from pallas_kernels.row_blocks import padded_rows
from tests.conftest import ManyDevices
from tests.jaxinfer.tiny import CPU_DTYPES, random_parameters, tiny_model
from tests.thorough import thorough_beyond

SLOTS, PAGES, PAGE_SIZE, TILE = 8, 512, 16, 16
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

# The layers of the default model; 8 kv heads; heads that are repeated and padded.
DEFAULT_LAYERS: dict[str, Any] = {
    "vocab_size": 4097,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
EIGHT_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 97}
TWO_HEADS = {"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 66}
ONE_HEAD = {
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 97,
    "tie_word_embeddings": True,
}


@dataclass
class Runner:
    """A model over the first ``num_devices`` devices, driven row by row of its sequences."""

    model: ModelConfig
    num_devices: int

    def __post_init__(self) -> None:
        self.mesh = make_mesh(jax.devices()[: self.num_devices])
        self.graph, state = models.abstract(self.model, CPU_DTYPES, self.mesh)
        self.abstract = abstract_parameters(state, self.mesh)
        self.abstract_pages = abstract_kv_pages(
            self.model, PAGES, PAGE_SIZE, CPU_DTYPES.kv_cache, self.mesh
        )
        self.programs: dict[tuple[int, int], Any] = {}

    def start(self, seed: int) -> None:
        """Draws one device's parameters, and takes what stands for them here."""
        physical = physical_model(self.model, self.num_devices)
        declared = models.declared_parameters(self.model)

        def place(path: Any, logical: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            axes = declared[tuple(entry.key for entry in path)].axes
            array = physical_parameter(axes, np.asarray(logical), self.model, physical)
            assert array.shape == wanted.shape, path
            return jax.device_put(array, wanted.sharding)

        logical = random_parameters(self.model, seed)
        self.parameters = jax.tree.map_with_path(place, logical, self.abstract)
        # Junk in the pages: stale content must not matter.
        self.pages = jax.tree.map(
            lambda leaf: jax.device_put(np.full(leaf.shape, 3, leaf.dtype), leaf.sharding),
            self.abstract_pages,
        )

    def program(self, decodes: int, tiles: int) -> Any:
        """Compiled for so many rows of one token and tiles of ``TILE``: (pages, logits [T, V])."""
        if (decodes, tiles) not in self.programs:
            whole = named_sharding(self.mesh)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_pages)
            jitted = jax.jit(self._forward, donate_argnums=1, out_shardings=(shardings, whole))
            rows = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
                self._rows(decodes, tiles, [], []),
            )
            lowered = jitted.lower(self.abstract, self.abstract_pages, *rows)
            self.programs[decodes, tiles] = lowered.compile()
        return self.programs[decodes, tiles]

    def run(
        self,
        decodes: list[tuple[int, int]],
        chunks: list[tuple[int, list[int]]],
        shape: tuple[int, int],
    ) -> np.ndarray:
        """``decodes`` (position, token) and ``chunks`` (start, tokens) of sequences 0, 1, ...

        Returns the logits [T, V] of all rows.
        """
        rows = self._rows(*shape, decodes, chunks)
        self.pages, logits = self.program(*shape)(self.parameters, self.pages, *rows)
        return np.asarray(logits)

    def _forward(self, parameters: Any, pages: Any, token_ids: jax.Array, batch: Any) -> Any:
        model = nnx.merge(self.graph, parameters)
        hidden, pages = model(token_ids, pages, batch)
        return pages, model.logits(hidden)

    def _rows(
        self,
        num_decodes: int,
        num_tiles: int,
        decodes: list[tuple[int, int]],
        chunks: list[tuple[int, list[int]]],
    ) -> tuple[np.ndarray, RaggedBatch]:
        tokens = np.zeros(num_decodes + num_tiles * TILE, np.int32)
        slots, starts, lens = np.zeros((3, num_decodes + num_tiles), np.int32)
        for row, (position, token) in enumerate(decodes):
            tokens[row], slots[row], starts[row], lens[row] = token, row, position, 1
        for tile, (start, ids) in enumerate(chunks):
            row, first = num_decodes + tile, num_decodes + tile * TILE
            tokens[first : first + len(ids)] = ids
            slots[row], starts[row], lens[row] = len(decodes) + tile, start, len(ids)
        table = np.arange(SLOTS * 8, dtype=np.int32).reshape(SLOTS, -1)
        n = num_decodes
        return tokens, RaggedBatch(
            jnp.asarray(table),
            QueryTiles(*(jnp.asarray(x[:n]) for x in (slots, starts, lens)), rows=1),
            QueryTiles(*(jnp.asarray(x[n:]) for x in (slots, starts, lens)), rows=TILE),
        )


def collectives(compiled: Any) -> dict[tuple[str, str], int]:
    """Counts a program's collectives by kind and shape (smallest dimension first) in its text."""
    kinds = "|".join(COLLECTIVES)
    found = re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", compiled.as_text())
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for result, kind in found:
        (shape,) = re.findall(r"\[([\d,]*)\]", result)
        counts[kind, " x ".join(sorted(shape.split(","), key=int))] += 1
    return dict(counts)


@dataclass(frozen=True)
class Compiled:
    """A program as one device sees it: collectives, and bytes that are updated in place, ..."""

    collectives: dict[tuple[str, str], int]
    aliased: int
    temporary: int
    pages: int
    layer_keys: int


def compile_program(changes: dict[str, Any], num_devices: int, shape: tuple[int, int]) -> Compiled:
    """Compiles the program of one batch shape."""
    split = Runner(tiny_model(**changes), num_devices)
    compiled = split.program(*shape)
    memory = compiled.memory_analysis()
    sizes = [
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(split.abstract_pages)
    ]
    return Compiled(
        collectives(compiled),
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        sum(sizes),
        sizes[0],
    )


TWO_SUMS: list[tuple[dict[str, Any], int]] = [
    (EIGHT_HEADS, 4),
    (DEFAULT_LAYERS | {"tie_word_embeddings": True}, 3),
]


@pytest.mark.parametrize(
    "shape",
    [pytest.param((8, 0), marks=pytest.mark.thorough("engines over more devices")), (8, 2)],
    ids=["decodes", "mixed"],
)
@pytest.mark.parametrize(
    ("changes", "num_devices"),
    thorough_beyond([TWO_SUMS[0]], TWO_SUMS, "engines over more devices"),
    ids=["embedding of its own", "tied"],
)
def test_two_sums_a_layer_and_pages_in_place(
    many_devices: ManyDevices, changes: dict[str, Any], num_devices: int, shape: tuple[int, int]
) -> None:
    for layers in (2, 4):
        deep = changes | {"num_hidden_layers": layers}
        compiled = many_devices(compile_program, deep, num_devices, shape)
        # One more sum for the rows of the embedding, one gather for the logits.
        rows, model = shape[0] + shape[1] * TILE, tiny_model(**deep)
        vocab = physical_model(model, num_devices).vocab_size
        wanted = collections.Counter({("all-gather", f"{rows} x {vocab}"): 1})
        wanted["all-reduce", f"{rows} x {model.hidden_size}"] += 1
        wanted["all-reduce", f"{padded_rows(rows)} x {model.hidden_size}"] += 2 * layers
        assert compiled.collectives == wanted
        assert compiled.aliased == compiled.pages
        # A copy of any page array would be larger than all temporaries.
        assert compiled.temporary < compiled.layer_keys


@functools.cache
def runner(changes: tuple[tuple[str, Any], ...], num_devices: int) -> Runner:
    """Compiled programs are shared by the functions of the process with many devices."""
    return Runner(tiny_model(**dict(changes)), num_devices)


@dataclass(frozen=True)
class Trace:
    """Two prompts side by side, then greedy tokens: the logits that each came from, [n, 2, V]."""

    prompts: np.ndarray
    logits: np.ndarray
    tokens: list[list[int]]


def generate(changes: dict[str, Any], num_devices: int, forced: Trace | None = None) -> Trace:
    """Prompts in chunks of one tile, the second beside a decode of the first, then 32 decodes.

    With ``forced`` its tokens are fed whatever is chosen here, so that all logits compare.
    """
    model = runner(tuple(sorted(changes.items())), num_devices)
    model.start(seed=1)
    vocab = model.model.vocab_size
    prompt = [int(token) for token in np.random.RandomState(0).randint(0, vocab, 40)]
    shape, prompts, logits, tokens = (8, 1), [], [], []
    for start in range(0, 40, TILE):
        ids = prompt[start : start + TILE]
        rows = model.run([], [(start, ids)], shape)
        prompts.append(rows[8 : 8 + len(ids)])
    # The second sequence's chunk runs beside a decode of the first.
    beside = model.run([(40, prompt[0])], [(0, prompt[:TILE])], shape)
    prompts.append(beside[:1])
    prompts.append(beside[8:])
    last = np.stack([beside[0], beside[8 + TILE - 1]])
    for step in range(32):
        logits.append(last)
        tokens.append([int(token) for token in np.argmax(last, axis=-1)])
        fed = (forced.tokens if forced else tokens)[step]
        last = model.run([(41 + step, fed[0]), (TILE + step, fed[1])], [], (8, 0))[:2]
    return Trace(np.concatenate(prompts), np.stack(logits), tokens)


DIVIDED: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    (DEFAULT_LAYERS, (3,)),
    (EIGHT_HEADS | {"num_hidden_layers": 1}, (2, 4, 8)),
    (TWO_HEADS, (4,)),
    (ONE_HEAD, (8,)),
]


@pytest.mark.parametrize(
    ("changes", "num_devices"),
    thorough_beyond([DIVIDED[2]], DIVIDED, "engines over more devices"),
    ids=["default layers", "split", "replicated and padded", "copies of padding, tied"],
)
def test_outputs_equal_those_of_one_device(
    many_devices: ManyDevices, changes: dict[str, Any], num_devices: tuple[int, ...]
) -> None:
    one = many_devices(generate, changes, 1)
    assert one.logits.shape[-1] == tiny_model(**changes).vocab_size
    assert changes.get("tie_word_embeddings") or len({str(t) for t in one.tokens}) > 4
    best = np.sort(one.logits, axis=-1)
    decisive = best[..., -1] - best[..., -2] > 1e-3
    assert decisive.mean() > 0.9
    for count in num_devices:
        split = many_devices(generate, changes, count, one)
        scale = np.abs(one.logits).max()
        for ours, theirs in ((split.prompts, one.prompts), (split.logits, one.logits)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale)
        assert (np.asarray(split.tokens) == np.asarray(one.tokens))[decisive].all()


@pytest.mark.parametrize(
    ("heads", "num_devices", "physical", "line"),
    [
        ((9, 3), 1, (9, 3), "3 kv heads over 1 devices: 3 each"),
        ((9, 3), 3, (9, 3), "3 kv heads over 3 devices: 1 each"),
        ((16, 8), 4, (16, 8), "8 kv heads over 4 devices: 2 each"),
        ((16, 8), 16, (16, 16), "8 kv heads replicated 2 times"),
        (
            (14, 2),
            4,
            (16, 4),
            "2 kv heads replicated 2 times, 14 query heads padded to 16",
        ),
        ((4, 1), 8, (8, 8), "1 kv heads replicated 8 times, 4 query heads padded to 8"),
    ],
)
def test_heads_are_split_or_repeated(
    heads: tuple[int, int], num_devices: int, physical: tuple[int, int], line: str
) -> None:
    model = tiny_model(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    shape = physical_model(model, num_devices)
    assert (shape.num_attention_heads, shape.num_key_value_heads) == physical
    assert shape.intermediate_size % num_devices == shape.vocab_size % num_devices == 0
    assert explain_heads(model, num_devices) == line
    assert (
        dataclasses.replace(
            shape,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
        )
        == model
    )


def test_heads_that_do_not_divide_are_refused() -> None:
    model = tiny_model(num_attention_heads=12, num_key_value_heads=6)
    message = r"6 kv heads .* over 4 devices: tensor parallelism must be 1, 2, 3 or a multiple of 6"
    with pytest.raises(ValueError, match=message):
        physical_model(model, 4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        physical_model(model, 0)


def test_every_head_stands_where_its_copy_reads_it() -> None:
    """3 query heads over 2 copies of their kv head: 2 and 1, and a head of zeros."""
    model = tiny_model()
    physical = physical_model(model, 4)
    declared = {path[-1]: one for path, one in models.declared_parameters(model).items()}
    qkv = np.random.RandomState(0).randn(48, 2, 5, 8)
    ours = physical_parameter(declared["qkv"].axes, qkv, model, physical)
    assert ours.shape == (48, 4, 4, 8)
    for copy, (kv_head, queries) in enumerate([(0, [0, 1]), (0, [2]), (1, [0, 1]), (1, [2])]):
        np.testing.assert_array_equal(ours[:, copy, : len(queries)], qkv[:, kv_head, queries])
        assert not ours[:, copy, len(queries) : 2].any()
        np.testing.assert_array_equal(ours[:, copy, 2:], qkv[:, kv_head, 3:])
    o_proj = np.random.RandomState(1).randn(2, 3, 8, 48)
    ours = physical_parameter(declared["o_proj"].axes, o_proj, model, physical)
    np.testing.assert_array_equal(ours[2], o_proj[1, :2])
    np.testing.assert_array_equal(ours[3, 0], o_proj[1, 2])
    assert not ours[3, 1].any()
