"""Columns and tables for tests of the sampler, and what it means in plain NumPy."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.sampling_columns import SamplingColumns, SlotTables

NUM_ENDINGS, NUM_BIASES = 32, 300
INTEGERS = ("top_k", "choices", "prompt_lens", "min_tokens", "num_biases", "ending_ids")


def make_columns(rows: int, **values: Any) -> SamplingColumns:
    """Plain greedy rows, seeds 0, 1, ..., with some columns replaced."""
    base: dict[str, np.ndarray] = {
        field.name: np.zeros(rows) for field in fields(SamplingColumns)
    } | {
        "top_p": np.ones(rows),
        "repetition_penalty": np.ones(rows),
        "seeds": np.stack([np.arange(rows), np.zeros(rows)], axis=1),
        "ending_ids": np.full((rows, NUM_ENDINGS), -1),
    }
    base |= {name: np.broadcast_to(value, base[name].shape) for name, value in values.items()}
    dtypes = dict.fromkeys(INTEGERS, "int32") | {"seeds": "uint32"}
    return SamplingColumns(
        **{name: jnp.asarray(v.astype(dtypes.get(name, "float32"))) for name, v in base.items()}
    )


def random_logits(rows: int, vocab: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.RandomState(seed).standard_normal((rows, vocab))).astype(np.float32)


@dataclass
class Rows:
    """A batch: R logits rows, where their tokens will stand, and whose they are."""

    logits: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    columns: SamplingColumns
    tables: SlotTables

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of ``sample`` and ``adjusted``, on the device."""
        row_arrays = (self.logits, self.positions, self.slots)
        return (*(jnp.asarray(array) for array in row_arrays), self.columns, self.tables)

    def pick(self, rows: Any) -> "Rows":
        """Some rows, in some order; the tables stay."""
        return Rows(
            self.logits[rows],
            self.positions[rows],
            self.slots[rows],
            jax.tree.map(lambda column: column[rows], self.columns),
            self.tables,
        )


def plain_rows(logits: np.ndarray, positions: np.ndarray, columns: SamplingColumns) -> Rows:
    """Rows of slots without tokens or biases."""
    rows = len(logits)
    tables = SlotTables(
        tokens=jnp.zeros((rows, 8), jnp.int32),
        bias_ids=jnp.zeros((rows, NUM_BIASES), jnp.int32),
        bias_values=jnp.zeros((rows, NUM_BIASES), jnp.float32),
    )
    positions = positions.astype(np.int32)
    return Rows(logits, positions, np.arange(rows, dtype=np.int32), columns, tables)


def random_rows(rows: int, vocab: int, *, max_len: int = 200, seed: int = 0, **values: Any) -> Rows:
    """Rows of random slots, every fifth of them padding; every other real row with ``values``.

    Tokens come from a small range, so that many come often. Beyond a sequence's tokens and biases
    the tables hold what could not be used: ids out of bounds, values that are not finite.
    """
    random = np.random.RandomState(seed)
    num_slots = rows + 3
    slots = random.permutation(num_slots)[:rows]
    slots[::5] = num_slots
    is_real = slots < num_slots
    positions = random.randint(1, max_len, rows)
    positions[[1, 2]] = [1, max_len - 1]
    prompt_lens = 1 + (random.rand(rows) * positions).astype(int)
    prompt_lens[3] = positions[3]  # the first new token: there is no output yet

    tokens = random.choice([-7, vocab, 2**31 - 1, 0], (num_slots, max_len))
    bias_ids = random.choice([-7, vocab, 2**31 - 1, 0], (num_slots, NUM_BIASES))
    bias_values = random.choice([np.nan, np.inf, 50.0], (num_slots, NUM_BIASES))
    some_ids = random.permutation(vocab)[: max(4, min(vocab // 3, 60))]
    num_biases = random.randint(1, min(NUM_BIASES, vocab), rows)
    for row in np.flatnonzero(is_real):
        slot, count = slots[row], num_biases[row]
        tokens[slot, : positions[row]] = random.choice(some_ids, positions[row])
        bias_ids[slot, :count] = random.permutation(vocab)[:count]
        bias_values[slot, :count] = random.uniform(-100, 100, count)

    ending_ids = np.full((rows, NUM_ENDINGS), -1)
    ending_ids[:, :20] = random.randint(0, vocab, (rows, 20))
    given = {"num_biases": num_biases, "min_tokens": np.where(np.arange(rows) % 4 < 2, 1 << 20, 1)}
    base = {"prompt_lens": prompt_lens, "ending_ids": ending_ids}
    defaults = make_columns(rows, **base)
    wanted = make_columns(
        rows, **base, **{name: given.get(name, value) for name, value in values.items()}
    )
    is_wanted = np.arange(rows) % 2 == 1

    def merge(default: jax.Array, value: jax.Array) -> jax.Array:
        shape = (rows,) + (1,) * (value.ndim - 1)
        merged = np.where(is_wanted.reshape(shape), value, default)
        return jnp.asarray(np.where(is_real.reshape(shape), merged, 0).astype(value.dtype))

    return Rows(
        random_logits(rows, vocab, seed),
        positions.astype(np.int32),
        slots.astype(np.int32),
        jax.tree.map(merge, defaults, wanted),
        SlotTables(
            jnp.asarray(tokens.astype(np.int32)),
            jnp.asarray(bias_ids.astype(np.int32)),
            jnp.asarray(bias_values.astype(np.float32)),
        ),
    )


def expected_logits(rows: Rows, row: int) -> np.ndarray:
    """[V] float64: one row's logits after penalties, biases and ``min_tokens``: the definition."""
    logits = rows.logits[row].astype(np.float64)
    slot, position = rows.slots[row], rows.positions[row]
    if slot >= rows.tables.tokens.shape[0]:
        return logits
    own = jax.tree.map(lambda column: np.asarray(column)[row], rows.columns)
    tokens = np.asarray(rows.tables.tokens)[slot, :position]
    for token in set(tokens):
        factor = float(own.repetition_penalty)
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    output = list(tokens[own.prompt_lens :])
    for token in set(output):
        logits[token] -= own.presence_penalty + own.frequency_penalty * output.count(token)
    bias_ids, bias_values = np.asarray(rows.tables.bias_ids), np.asarray(rows.tables.bias_values)
    for index in range(own.num_biases):
        logits[bias_ids[slot, index]] += bias_values[slot, index]
    if position - own.prompt_lens < own.min_tokens:
        logits[own.ending_ids[own.ending_ids >= 0]] = -np.inf
    return logits


def survivors(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> np.ndarray:
    """[V] bool: which tokens the filters leave, by sorting: the definition."""
    scaled = logits.astype(np.float64) / temperature
    kept = np.ones(len(logits), bool)
    if top_k:
        kept &= scaled >= np.sort(scaled)[::-1][min(top_k, len(scaled)) - 1]
    if top_p < 1:
        weights = np.where(kept, np.exp(scaled - scaled.max()), 0)
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order]) / weights.sum()
        last = order[min(int(np.searchsorted(mass, top_p - 1e-9)), len(order) - 1)]
        kept &= scaled >= scaled[last]
    return kept & (np.exp(scaled - scaled.max()) >= min_p)
