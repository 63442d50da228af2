"""Packing a schedule: what the device unpacks is what the scheduler meant."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch import BatchShape, batch_shapes, fitting_shape, pack, packed_size, unpack
from jaxinfer.request import SamplingParams
from jaxinfer.schedule import Schedule, ScheduledSequence
from tests.jaxinfer.tiny import tiny_config

CONFIG = tiny_config()
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100, width=32),
    top_k=st.integers(0, 1 << 20),
    top_p=st.floats(0.0078125, 1.0, width=32),
    seed=st.integers(0, (1 << 64) - 1),
)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Up to 8 sequences in different slots, at most 4 tiles of 16 rows."""
    slots = draw(st.permutations(range(CONFIG.max_num_seqs)))
    num_decodes = draw(st.integers(0, 6))
    decodes, chunks, tiles = [], [], 4
    for slot in slots[:num_decodes]:
        start = draw(st.integers(0, 126))
        decodes.append(sequence(draw, slot, start, 1, samples=True))
    for slot in slots[num_decodes : draw(st.integers(num_decodes, CONFIG.max_num_seqs))]:
        if not tiles:
            break
        length = draw(st.integers(1, tiles * CONFIG.chunk_tile))
        tiles -= -(-length // CONFIG.chunk_tile)
        start = draw(st.integers(0, CONFIG.max_model_len - length))
        chunks.append(sequence(draw, slot, start, length, samples=draw(st.booleans())))
    return Schedule(tuple(decodes), tuple(chunks))


def sequence(
    draw: st.DrawFn, slot: int, start: int, length: int, samples: bool
) -> ScheduledSequence:
    num_pages = -(-(start + length) // CONFIG.page_size)
    return ScheduledSequence(
        request_id=f"slot{slot}",
        slot=slot,
        start=start,
        token_ids=tuple(draw(st.lists(st.integers(0, 95), min_size=length, max_size=length))),
        page_ids=tuple(draw(st.permutations(range(num_pages)))),
        samples=samples,
        sampling=draw(samplings),
    )


@given(schedules())
def test_the_device_sees_the_schedule(schedule: Schedule) -> None:
    shape = fitting_shape(batch_shapes(CONFIG), schedule, CONFIG.chunk_tile)
    packed, rows = pack(schedule, shape, CONFIG)
    assert packed.shape == (packed_size(shape, CONFIG),)
    batch = unpack(packed, shape, CONFIG)  # type: ignore[arg-type]
    padding = CONFIG.max_num_seqs

    wanted = [decode.slot for decode in schedule.decodes]
    wanted += [padding] * (shape.num_decodes - len(wanted))
    np.testing.assert_array_equal(batch.decode_slots, wanted)

    seen: dict[int, list[int]] = {}
    for tile in range(shape.num_tiles):
        slot, length = int(batch.chunk_slots[tile]), int(batch.chunk_lens[tile])
        if slot == padding:
            assert length == 0
            continue
        tokens = seen.setdefault(slot, [])
        chunk = next(chunk for chunk in schedule.chunks if chunk.slot == slot)
        assert int(batch.chunk_starts[tile]) == chunk.start + len(tokens)
        tokens += np.asarray(batch.chunk_tokens[tile])[:length].tolist()
        is_last = len(tokens) == len(chunk.token_ids)
        assert bool(batch.chunk_samples[tile]) == (is_last and chunk.samples)
        if is_last and chunk.samples:
            assert rows[chunk.request_id] == shape.num_decodes + tile
    assert seen == {chunk.slot: list(chunk.token_ids) for chunk in schedule.chunks}

    everyone = [*schedule.decodes, *schedule.chunks]
    assert set(rows) == {s.request_id for s in everyone if s.samples}
    for s in everyone:
        np.testing.assert_array_equal(batch.page_table[s.slot][: len(s.page_ids)], s.page_ids)
        if s.samples:
            row = rows[s.request_id]
            assert float(batch.temperature[row]) == s.sampling.temperature
            assert float(batch.top_p[row]) == s.sampling.top_p
            assert int(batch.top_k[row]) == s.sampling.top_k
            low, high = (int(word) for word in batch.seeds[row])
            assert low + (high << 32) == s.sampling.seed


@given(schedules())
def test_the_smallest_shape_is_taken(schedule: Schedule) -> None:
    shapes = batch_shapes(CONFIG)
    tiles = sum(-(-len(chunk.token_ids) // CONFIG.chunk_tile) for chunk in schedule.chunks)
    shape = fitting_shape(shapes, schedule, CONFIG.chunk_tile)
    assert shape.num_tiles == min(s.num_tiles for s in shapes if s.num_tiles >= tiles)
    assert shape.num_decodes >= len(schedule.decodes)


@pytest.mark.parametrize("max_num_seqs", [1, 7, 8, 9, 64, 1000])
@pytest.mark.parametrize("max_num_batched_tokens", [16, 17, 48, 512, 65536])
def test_every_schedule_fits_some_shape(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    config = tiny_config(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    shapes = batch_shapes(config)
    most = shapes[-1]
    assert len(shapes) <= 10
    assert most.num_decodes >= max_num_seqs
    assert most.num_tiles == max_num_batched_tokens // config.chunk_tile
    assert BatchShape(8, 0) in shapes
    assert all(shape.num_logits_rows >= 8 for shape in shapes)
