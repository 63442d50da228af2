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
from jaxinfer.schedule import Schedule, ScheduledSequence


@dataclass(frozen=True)
class BatchShape:
    """What a step program is compiled for: rows are padded up to these."""

    num_decodes: int
    num_tiles: int

    @property
    def num_logits_rows(self) -> int:
        """R: one row a decode and one a tile, since a chunk that samples ends some tile."""
        return self.num_decodes + self.num_tiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Device view. S slots, P pages per sequence, D decodes, N tiles of B rows, R = D + N.

    A slot of S means padding: it is out of bounds and what is written there is dropped.
    """

    page_table: jax.Array  # [S, P] int32, by slot
    decode_slots: jax.Array  # [D] int32
    chunk_slots: jax.Array  # [N] int32
    chunk_starts: jax.Array  # [N] int32, position of the tile's first token
    chunk_lens: jax.Array  # [N] int32
    chunk_samples: jax.Array  # [N] int32, 1 where the tile's last token yields a new one
    chunk_tokens: jax.Array  # [N, B] int32
    temperature: jax.Array  # [R] float32
    top_p: jax.Array  # [R] float32
    top_k: jax.Array  # [R] int32
    seeds: jax.Array  # [R, 2] uint32
    choices: jax.Array  # [R] int32


def batch_shapes(config: EngineConfig) -> tuple[BatchShape, ...]:
    """The shapes that are compiled, at most ten, smallest first.

    At least 8 decode rows, padding included: matrix products with fewer rows take another code
    path on XLA:CPU, and a row's bits would depend on how many neighbours it has.
    """
    most = -(-config.max_num_seqs // 8) * 8
    decodes = [8] if most == 8 else [8, most]
    max_tiles = config.max_num_batched_tokens // config.chunk_tile
    tiles = sorted({0, 1, max(1, max_tiles // 4), max_tiles})
    return tuple(BatchShape(rows, count) for rows in decodes for count in tiles)


def fitting_shape(
    shapes: tuple[BatchShape, ...], schedule: Schedule, chunk_tile: int
) -> BatchShape:
    """The smallest compiled shape that holds ``schedule``."""
    tiles = sum(-(-len(chunk.token_ids) // chunk_tile) for chunk in schedule.chunks)
    fitting = [
        shape
        for shape in shapes
        if shape.num_decodes >= len(schedule.decodes) and shape.num_tiles >= tiles
    ]
    assert fitting, f"{len(schedule.decodes)} decodes and {tiles} tiles fit no shape: {shapes}"
    return min(fitting, key=lambda shape: shape.num_decodes + shape.num_tiles * chunk_tile)


def packed_size(shape: BatchShape, config: EngineConfig) -> int:
    """Length of the packed int32 buffer."""
    return sum(math.prod(dimensions) for dimensions, _ in _fields(shape, config).values())


def unpack(packed: jax.Array, shape: BatchShape, config: EngineConfig) -> Batch:
    """Splits the buffer into its views; free inside a compiled program."""
    views, offset = {}, 0
    for name, (dimensions, dtype) in _fields(shape, config).items():
        size = math.prod(dimensions)
        view = packed[offset : offset + size].reshape(dimensions)
        views[name] = jax.lax.bitcast_convert_type(view, jnp.dtype(dtype))
        offset += size
    return Batch(**views)


def pack(
    schedule: Schedule, shape: BatchShape, config: EngineConfig
) -> tuple[np.ndarray, dict[str, int]]:
    """The packed buffer, and for every sequence that samples the logits row of its new token."""
    packed = np.zeros(packed_size(shape, config), np.int32)
    views, offset = {}, 0
    for name, (dimensions, dtype) in _fields(shape, config).items():
        size = math.prod(dimensions)
        views[name] = packed[offset : offset + size].view(dtype).reshape(dimensions)
        offset += size
    views["decode_slots"][:] = config.max_num_seqs
    views["chunk_slots"][:] = config.max_num_seqs

    rows: dict[str, int] = {}
    for row, decode in enumerate(schedule.decodes):
        views["decode_slots"][row] = decode.slot
        _pack_sequence(views, decode, row)
        rows[decode.request_id] = row
    tile, size = 0, config.chunk_tile
    for chunk in schedule.chunks:
        for first in range(0, len(chunk.token_ids), size):
            tokens = chunk.token_ids[first : first + size]
            views["chunk_slots"][tile] = chunk.slot
            views["chunk_starts"][tile] = chunk.start + first
            views["chunk_lens"][tile] = len(tokens)
            views["chunk_tokens"][tile, : len(tokens)] = tokens
            tile += 1
        row = shape.num_decodes + tile - 1
        _pack_sequence(views, chunk, row)
        if chunk.samples:
            views["chunk_samples"][tile - 1] = 1
            rows[chunk.request_id] = row
    return packed, rows


def _pack_sequence(views: dict[str, np.ndarray], sequence: ScheduledSequence, row: int) -> None:
    views["page_table"][sequence.slot, : len(sequence.page_ids)] = sequence.page_ids
    sampling = sequence.sampling
    views["temperature"][row] = sampling.temperature
    views["top_p"][row] = sampling.top_p
    views["top_k"][row] = sampling.top_k
    views["seeds"][row] = sampling.seed & 0xFFFFFFFF, sampling.seed >> 32


def _fields(shape: BatchShape, config: EngineConfig) -> dict[str, tuple[tuple[int, ...], type]]:
    """Name -> (dimensions, dtype of 4 bytes), in the order of the packed buffer."""
    decodes, tiles, rows = shape.num_decodes, shape.num_tiles, shape.num_logits_rows
    return {
        "page_table": ((config.max_num_seqs, config.max_pages_per_sequence), np.int32),
        "decode_slots": ((decodes,), np.int32),
        "chunk_slots": ((tiles,), np.int32),
        "chunk_starts": ((tiles,), np.int32),
        "chunk_lens": ((tiles,), np.int32),
        "chunk_samples": ((tiles,), np.int32),
        "chunk_tokens": ((tiles, config.chunk_tile), np.int32),
        "temperature": ((rows,), np.float32),
        "top_p": ((rows,), np.float32),
        "top_k": ((rows,), np.int32),
        "seeds": ((rows, 2), np.uint32),
        "choices": ((rows,), np.int32),
    }
