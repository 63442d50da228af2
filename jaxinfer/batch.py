"""A step's rows as arrays: one packed int32 buffer on the host, named views of it on the device.

The batch is decode-first: D decode rows of one token, then N tiles of ``chunk_tile`` prompt tokens.
Positions and tokens of decode rows are not here: the device knows them (see step.py).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.request import LIMITS, SAMPLING_OPTIONS
from jaxinfer.sampling_columns import OptionColumns, SamplingColumns
from jaxinfer.schedule import Schedule, ScheduledSequence

MAX_ENDING_TOKENS = int(LIMITS["num_ending_token_ids"].high)
# A step has this many rows of decodes at least, padding included: matrix products with fewer rows
# take another code path on XLA:CPU, and a row's bits would depend on how many neighbours it has.
MIN_DECODE_ROWS = 8


@dataclass(frozen=True)
class BatchShape:
    """Sizes that a step program is compiled for: rows are padded up to these.

    With ``num_drafts`` K a decode has K + 1 rows, its own and those of drafts to be verified.
    """

    num_decodes: int
    num_tiles: int
    num_drafts: int = 0

    @property
    def num_decode_rows(self) -> int:
        """Rows of all decodes, which come first."""
        return self.num_decodes * (self.num_drafts + 1)

    @property
    def num_logits_rows(self) -> int:
        """R: all of decodes and one a tile, since a chunk that samples ends some tile."""
        return self.num_decode_rows + self.num_tiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotColumns(OptionColumns):
    """Wishes of each slot's request, [S] each; see ``request.SamplingParams`` for the options.

    ``end_positions``: the position at which ``max_tokens`` is exceeded. ``num_logprobs`` is -1 for
    none. ``ending_ids`` [S, K] is padded with -1. ``cached_lens``: tokens found in the prefix
    cache, of which the first ``draft_cached_lens`` have keys and values of the draft model, too.
    """

    seeds: jax.Array  # [S, 2] uint32, low and high word
    choices: jax.Array
    prompt_lens: jax.Array
    min_tokens: jax.Array
    end_positions: jax.Array
    num_biases: jax.Array
    num_logprobs: jax.Array
    ending_ids: jax.Array
    cached_lens: jax.Array
    draft_cached_lens: jax.Array

    def of(self, slots: jax.Array) -> "SlotColumns":
        """Returns the columns of ``slots`` [R], zeros for a slot of S."""
        return jax.tree.map(lambda column: column.at[slots].get(mode="fill", fill_value=0), self)

    def sampling(self) -> SamplingColumns:
        """Returns those that the sampler reads."""
        names = SamplingColumns.__dataclass_fields__
        return SamplingColumns(**{name: getattr(self, name) for name in names})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Device view. S slots, P pages per sequence, D decodes, N tiles of B rows.

    A slot of S means padding: it is out of bounds and what is written there is dropped.
    """

    page_table: jax.Array  # [S, P] int32, by slot
    slots: SlotColumns
    num_steps: jax.Array  # [] int32, how many steps a call without chunks may run
    decode_slots: jax.Array  # [D] int32
    max_tokens: jax.Array  # [D] int32, how many tokens the call may yield at most
    max_drafts: jax.Array  # [D] int32, how many drafts of a step are verified at most
    chunk_slots: jax.Array  # [N] int32
    chunk_starts: jax.Array  # [N] int32, position of the tile's first token
    chunk_lens: jax.Array  # [N] int32
    chunk_samples: jax.Array  # [N] int32, 1 where the tile's last token yields a new one
    chunk_scores: jax.Array  # [N] int32, 1 where prompt log-probabilities are wanted
    chunk_next: jax.Array  # [N] int32, the prompt's token after the tile
    chunk_tokens: jax.Array  # [N, B] int32


def batch_shapes(config: EngineConfig) -> tuple[BatchShape, ...]:
    """The shapes that are compiled, smallest first; at most ten without drafts.

    None has fewer than ``MIN_DECODE_ROWS``. So the drafts of a single sequence may take the place
    of padding, and cost nothing.
    """
    decodes = sorted({MIN_DECODE_ROWS, padded_decodes(config.max_num_seqs)})
    counts = (0, *config.tile_counts)
    plain = [BatchShape(rows, count) for rows in decodes for count in counts]
    num_drafts = config.most_drafts
    if not num_drafts:
        return tuple(plain)
    fewest = -(-MIN_DECODE_ROWS // (num_drafts + 1))
    most = max(fewest, min(config.max_draft_seqs, config.max_num_seqs))
    fewer = sorted({rows for rows in (fewest, most // 2) if fewest <= rows < most})
    alone = [BatchShape(rows, 0, num_drafts) for rows in fewer]
    return (*plain, *alone, *(BatchShape(most, count, num_drafts) for count in counts))


def padded_decodes(num_seqs: int) -> int:
    """Rounds ``num_seqs`` up to the decodes that a step without drafts is compiled for."""
    return -(-num_seqs // MIN_DECODE_ROWS) * MIN_DECODE_ROWS


def fitting_shape(
    shapes: tuple[BatchShape, ...], schedule: Schedule, chunk_tile: int
) -> BatchShape:
    """The smallest compiled shape that holds ``schedule``; a plain one if drafts do not fit."""
    tiles = sum(-(-len(chunk.token_ids) // chunk_tile) for chunk in schedule.chunks)
    fitting = [
        shape
        for shape in shapes
        if shape.num_decodes >= len(schedule.decodes) and shape.num_tiles >= tiles
    ]
    wanted = [shape for shape in fitting if bool(shape.num_drafts) == bool(schedule.num_drafts)]
    fitting = wanted or [shape for shape in fitting if not shape.num_drafts]
    assert fitting, f"{len(schedule.decodes)} decodes and {tiles} tiles fit no shape: {shapes}"
    return min(fitting, key=lambda shape: shape.num_decode_rows + shape.num_tiles * chunk_tile)


def packed_size(shape: BatchShape, config: EngineConfig) -> int:
    """Length of the packed int32 buffer."""
    return _size(_slot_fields(config)) + _size(_row_fields(shape, config))


def unpack(packed: jax.Array, shape: BatchShape, config: EngineConfig) -> Batch:
    """Splits the buffer into its views; free inside a compiled program."""
    views, offset = {}, 0
    for name, (dimensions, dtype) in (_slot_fields(config) | _row_fields(shape, config)).items():
        size = math.prod(dimensions)
        view = packed[offset : offset + size].reshape(dimensions)
        views[name] = jax.lax.bitcast_convert_type(view, jnp.dtype(dtype))
        offset += size
    slots = SlotColumns(**{name: views.pop(name) for name in SlotColumns.__dataclass_fields__})
    return Batch(**views, slots=slots)


class Packer:
    """Writes schedules into packed buffers. What slots ask for, and their pages, are kept here.

    A slot's row is written when its sequence is admitted, and grows by the pages that are new: a
    step costs the host a copy and a few numbers a row.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._slot_part = np.zeros(_size(_slot_fields(config)), np.int32)
        self._slots = _views(self._slot_part, _slot_fields(config))
        self._admissions = [-1] * config.max_num_seqs
        self._num_pages = [0] * config.max_num_seqs

    def pack(self, schedule: Schedule, shape: BatchShape) -> tuple[np.ndarray, list[int]]:
        """A new buffer, and for every scheduled sequence its logits row, decodes before chunks.

        Of a decode with drafts the first of its rows.
        """
        for sequence in schedule.decodes:
            self._update_slot(sequence)
        for sequence in schedule.chunks:
            self._update_slot(sequence)
        packed = np.empty(packed_size(shape, self._config), np.int32)
        packed[: self._slot_part.size] = self._slot_part
        rows_part = packed[self._slot_part.size :]
        rows_part[:] = 0
        views = _views(rows_part, _row_fields(shape, self._config))
        views["num_steps"][...] = schedule.num_steps
        views["decode_slots"][:] = self._config.max_num_seqs
        views["chunk_slots"][:] = self._config.max_num_seqs
        decode_slots = [decode.slot for decode in schedule.decodes]
        views["decode_slots"][: len(decode_slots)] = decode_slots
        views["max_tokens"][: len(decode_slots)] = [s.num_tokens for s in schedule.decodes]
        views["max_drafts"][: len(decode_slots)] = [s.num_drafts for s in schedule.decodes]
        width = shape.num_drafts + 1
        rows = list(range(0, width * len(decode_slots), width))
        tile = 0
        for chunk in schedule.chunks:
            tile = self._pack_chunk(views, chunk, tile)
            rows.append(shape.num_decode_rows + tile - 1)
        return packed, rows

    def _pack_chunk(self, views: dict[str, np.ndarray], chunk: ScheduledSequence, tile: int) -> int:
        """Writes a chunk's tiles from ``tile`` on; the first tile after them."""
        size = self._config.chunk_tile
        following = (*chunk.token_ids[1:], chunk.next_token_id)
        # Choices share their prompt: it is scored once.
        scores = chunk.request.prompt_logprobs is not None and chunk.choice == 0
        for first in range(0, len(chunk.token_ids), size):
            tokens = chunk.token_ids[first : first + size]
            views["chunk_slots"][tile] = chunk.slot
            views["chunk_starts"][tile] = chunk.start + first
            views["chunk_lens"][tile] = len(tokens)
            views["chunk_scores"][tile] = scores
            views["chunk_next"][tile] = following[first + len(tokens) - 1]
            views["chunk_tokens"][tile, : len(tokens)] = tokens
            tile += 1
        views["chunk_samples"][tile - 1] = chunk.samples
        return tile

    def _update_slot(self, sequence: ScheduledSequence) -> None:
        slot, page_ids = sequence.slot, sequence.page_ids
        if self._admissions[slot] != sequence.admission:
            self._admissions[slot] = sequence.admission
            self._num_pages[slot] = 0
            self._write_columns(sequence)
        known = self._num_pages[slot]
        if len(page_ids) != known:
            self._slots["page_table"][slot, known : len(page_ids)] = page_ids[known:]
            self._num_pages[slot] = len(page_ids)

    def _write_columns(self, sequence: ScheduledSequence) -> None:
        request, sampling = sequence.request, sequence.request.sampling
        prompt_len = len(request.prompt_token_ids)
        ending = request.ending_token_ids
        values = {
            **{option.name: getattr(sampling, option.name) for option in SAMPLING_OPTIONS},
            "seeds": (sampling.seed & 0xFFFFFFFF, sampling.seed >> 32),
            "choices": sequence.choice,
            "prompt_lens": prompt_len,
            "min_tokens": request.min_tokens,
            "end_positions": prompt_len + request.max_tokens,
            "num_biases": len(sampling.logit_bias),
            "num_logprobs": -1 if request.logprobs is None else request.logprobs,
            "ending_ids": ending + (-1,) * (MAX_ENDING_TOKENS - len(ending)),
            "cached_lens": len(sequence.cached_token_ids),
            "draft_cached_lens": sequence.num_drafter_kv_tokens,
        }
        for name, value in values.items():
            self._slots[name][sequence.slot] = value


type _Fields = dict[str, tuple[tuple[int, ...], type]]


def _slot_fields(config: EngineConfig) -> _Fields:
    """Fields that are kept by slot: name -> (dimensions, dtype of 4 bytes), in buffer order."""
    slots = config.max_num_seqs
    floats = {option.name for option in SAMPLING_OPTIONS if option.kind is float}
    fields: _Fields = {"page_table": ((slots, config.max_pages_per_sequence), np.int32)}
    for name in SlotColumns.__dataclass_fields__:
        fields[name] = ((slots,), np.float32 if name in floats else np.int32)
    fields["seeds"] = ((slots, 2), np.uint32)
    fields["ending_ids"] = ((slots, MAX_ENDING_TOKENS), np.int32)
    return fields


def _row_fields(shape: BatchShape, config: EngineConfig) -> _Fields:
    """Fields that differ from step to step, behind the slots' part."""
    decodes, tiles = shape.num_decodes, shape.num_tiles
    by_tile = ("slots", "starts", "lens", "samples", "scores", "next")
    return {
        "num_steps": ((), np.int32),
        "decode_slots": ((decodes,), np.int32),
        "max_tokens": ((decodes,), np.int32),
        "max_drafts": ((decodes,), np.int32),
        **{f"chunk_{name}": ((tiles,), np.int32) for name in by_tile},
        "chunk_tokens": ((tiles, config.chunk_tile), np.int32),
    }


def _size(fields: _Fields) -> int:
    return sum(math.prod(dimensions) for dimensions, _ in fields.values())


def _views(buffer: np.ndarray, fields: _Fields) -> dict[str, np.ndarray]:
    views, offset = {}, 0
    for name, (dimensions, dtype) in fields.items():
        size = math.prod(dimensions)
        views[name] = buffer[offset : offset + size].view(dtype).reshape(dimensions)
        offset += size
    return views
