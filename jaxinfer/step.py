"""The step program: embed, layers over the paged KV cache, logits, sampling, all in one jit.

The device state is donated and carries what decoding needs from step to step, so that the host
never has to send back a token it has only just received.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.batch import Batch, BatchShape, packed_size, unpack
from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.kv_cache import abstract_kv_pages
from jaxinfer.sampling import SamplingColumns, sample
from jaxinfer.sharding import named_sharding
from pallas_kernels.ragged_paged_attention import KVPages, QueryTiles, RaggedBatch

Parameters = dict[Any, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """Donated device state. L layers, S slots, M = max_model_len.

    ``kv_pages``: layer by layer. ``tokens`` [S, M] int32: known tokens of each slot's sequence.
    ``lens`` [S] int32: how many of them have their keys and values in the pages; a decode computes
    the token at that position.
    """

    kv_pages: tuple[KVPages, ...]
    tokens: jax.Array
    lens: jax.Array


def abstract_state(
    model: ModelConfig, config: EngineConfig, dtypes: DtypePolicy, mesh: Mesh
) -> StepState:
    """Shapes and shardings of the state."""
    whole = named_sharding(mesh)
    slots = config.max_num_seqs
    return StepState(
        kv_pages=abstract_kv_pages(
            model, config.num_pages, config.page_size, dtypes.kv_cache, mesh
        ),  # type: ignore[arg-type]
        tokens=jax.ShapeDtypeStruct((slots, config.max_model_len), jnp.int32, sharding=whole),  # type: ignore[arg-type]
        lens=jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=whole),  # type: ignore[arg-type]
    )


def ragged_batch(batch: Batch, lens: jax.Array, config: EngineConfig) -> RaggedBatch:
    """What attention needs to know of a batch; decode positions are the slots' lengths."""
    slots = config.max_num_seqs
    is_decode = batch.decode_slots < slots
    decode_starts = lens.at[batch.decode_slots].get(mode="fill", fill_value=0)
    return RaggedBatch(
        page_table=batch.page_table,
        decodes=QueryTiles(
            sequences=jnp.minimum(batch.decode_slots, slots - 1),
            starts=decode_starts,
            lens=is_decode.astype(jnp.int32),
            rows=1,
        ),
        chunks=QueryTiles(
            sequences=jnp.minimum(batch.chunk_slots, slots - 1),
            starts=batch.chunk_starts,
            lens=batch.chunk_lens,
            rows=config.chunk_tile,
        ),
    )


def forward(
    model: Any, state: StepState, batch: Batch, config: EngineConfig
) -> tuple[jax.Array, RaggedBatch, StepState]:
    """Hidden states [T, E] of all rows, and the state with their tokens, keys and values in it."""
    ragged = ragged_batch(batch, state.lens, config)
    decode_tokens = state.tokens.at[batch.decode_slots, ragged.decodes.starts].get(
        mode="fill", fill_value=0
    )
    token_ids = jnp.concatenate([decode_tokens, batch.chunk_tokens.reshape(-1)])
    hidden, kv_pages = model(token_ids, state.kv_pages, ragged)

    chunks = ragged.chunks
    written_slots = jnp.where(
        chunks.is_real(), batch.chunk_slots[:, None], config.max_num_seqs
    )  # [N, B]
    tokens = state.tokens.at[written_slots, chunks.positions()].set(batch.chunk_tokens, mode="drop")
    # A slot may have served another, longer sequence before: its length starts anew.
    lens = state.lens.at[batch.chunk_slots].set(0, mode="drop")
    lens = lens.at[batch.chunk_slots].max(batch.chunk_starts + batch.chunk_lens, mode="drop")
    lens = lens.at[batch.decode_slots].add(1, mode="drop")
    return hidden, ragged, StepState(kv_pages, tokens, lens)


def step(
    graph: nnx.GraphDef[Any],
    config: EngineConfig,
    shape: BatchShape,
    parameters: Parameters,
    state: StepState,
    packed: jax.Array,
) -> tuple[StepState, jax.Array]:
    """One step: (state, sampled token ids [R] int32). Rows that do not sample mean nothing."""
    model = nnx.merge(graph, parameters)
    batch = unpack(packed, shape, config)
    hidden, ragged, state = forward(model, state, batch, config)

    last = jnp.maximum(batch.chunk_lens - 1, 0)
    tile_rows = shape.num_decodes + jnp.arange(shape.num_tiles) * config.chunk_tile + last
    logits_rows = jnp.concatenate([jnp.arange(shape.num_decodes), tile_rows])  # [R]
    new_positions = ragged.positions()[logits_rows] + 1
    columns = SamplingColumns(
        batch.temperature, batch.top_k, batch.top_p, batch.seeds, batch.choices
    )
    sampled = sample(model.logits(hidden[logits_rows]), new_positions, columns)

    chunk_slots = jnp.where(batch.chunk_samples > 0, batch.chunk_slots, config.max_num_seqs)
    sample_slots = jnp.concatenate([batch.decode_slots, chunk_slots])
    tokens = state.tokens.at[sample_slots, new_positions].set(sampled, mode="drop")
    return StepState(state.kv_pages, tokens, state.lens), sampled


def score(
    graph: nnx.GraphDef[Any],
    config: EngineConfig,
    shape: BatchShape,
    parameters: Parameters,
    state: StepState,
    packed: jax.Array,
    targets: jax.Array,
) -> tuple[StepState, jax.Array]:
    """(state, nats [N, B] that ``targets`` [N, B] cost after each chunk row: -log p)."""
    model = nnx.merge(graph, parameters)
    batch = unpack(packed, shape, config)
    hidden, _, state = forward(model, state, batch, config)
    tiles = hidden[shape.num_decodes :].reshape(shape.num_tiles, config.chunk_tile, -1)

    def tile_losses(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, wanted = tile  # one tile at a time: its logits are [B, V] float32
        log_probabilities = jax.nn.log_softmax(model.logits(rows), axis=-1)
        return -jnp.take_along_axis(log_probabilities, wanted[:, None], axis=-1)[:, 0]

    return state, jax.lax.map(tile_losses, (tiles, targets))


def compiler_options(platform: str, dtypes: DtypePolicy) -> dict[str, str]:
    """XLA options of a step. On CPU in float32 they make a row's bits independent of its batch.

    YNN kernels, XLA:CPU's default, pick another blocking for 1, 2-32 and more rows.
    """
    if platform == "cpu" and dtypes.weights == "float32":
        return {"xla_cpu_experimental_ynn_fusion_type": ""}
    return {}


def lower(
    program: Any,
    graph: nnx.GraphDef[Any],
    config: EngineConfig,
    shape: BatchShape,
    parameters: Parameters,
    state: StepState,
    mesh: Mesh,
) -> Any:
    """Lowers ``step`` or ``score`` for one batch shape, ready to compile; nothing is allocated.

    ``parameters`` and ``state`` are abstract, with shardings.
    """
    whole = named_sharding(mesh)
    arguments = [
        jax.ShapeDtypeStruct((packed_size(shape, config),), np.int32, sharding=whole),
    ]
    if program is score:
        tiles = (shape.num_tiles, config.chunk_tile)
        arguments.append(jax.ShapeDtypeStruct(tiles, np.int32, sharding=whole))
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(
        program,
        static_argnums=(0, 1, 2),
        donate_argnums=(4,),
        out_shardings=(state_shardings, whole),
    )
    return jitted.trace(graph, config, shape, parameters, state, *arguments).lower()
