"""Packing a schedule: what the device unpacks is what the scheduler meant."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch import (
    Batch,
    BatchShape,
    Packer,
    batch_shapes,
    fitting_shape,
    packed_size,
    unpack,
)
from jaxinfer.request import Request, SamplingParams
from jaxinfer.schedule import Schedule, ScheduledSequence
from tests.jaxinfer.tiny import tiny_config

CONFIG = tiny_config()
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100, width=32),
    top_k=st.integers(0, 1 << 20),
    top_p=st.floats(0.0078125, 1.0, width=32),
    min_p=st.floats(0, 1, width=32),
    repetition_penalty=st.floats(0.5, 2, width=32),
    presence_penalty=st.floats(-2, 2, width=32),
    frequency_penalty=st.floats(-2, 2, width=32),
    logit_bias=st.sampled_from([(), ((3, 1.5),), ((1, -1.0), (2, 2.0))]),
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
        decodes.append(sequence(draw, slot, start, 1, is_chunk=False))
    for slot in slots[num_decodes : draw(st.integers(num_decodes, CONFIG.max_num_seqs))]:
        if not tiles:
            break
        length = draw(st.integers(1, tiles * CONFIG.chunk_tile))
        tiles -= -(-length // CONFIG.chunk_tile)
        start = draw(st.integers(0, CONFIG.max_model_len - length))
        chunks.append(sequence(draw, slot, start, length, is_chunk=True))
    return Schedule(tuple(decodes), tuple(chunks), 1 if chunks else draw(st.integers(1, 4)))


def sequence(
    draw: st.DrawFn, slot: int, start: int, length: int, is_chunk: bool
) -> ScheduledSequence:
    num_pages = -(-(start + length) // CONFIG.page_size)
    token_ids = draw(st.lists(st.integers(0, 95), min_size=length, max_size=length))
    request = Request(
        request_id=f"slot{slot}",
        prompt_token_ids=(1,) * draw(st.integers(1, 100)),
        max_tokens=draw(st.integers(20, 40)),
        min_tokens=draw(st.integers(0, 20)),
        sampling=draw(samplings),
        eos_token_ids=(0,),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, 95), max_size=16))),
        logprobs=draw(st.sampled_from([None, 0, 20])),
        prompt_logprobs=draw(st.sampled_from([None, 0, 20])),
    )
    return ScheduledSequence(
        request=request,
        choice=draw(st.integers(0, 15)),
        slot=slot,
        admission=draw(st.integers(0, 1000)),
        start=start,
        num_tokens=length,
        page_ids=tuple(draw(st.permutations(range(num_pages)))),
        samples=draw(st.booleans()) if is_chunk else True,
        token_ids=tuple(token_ids) if is_chunk else (),
        next_token_id=draw(st.integers(0, 95)),
    )


@given(schedules())
def test_the_device_sees_the_schedule(schedule: Schedule) -> None:
    shape = fitting_shape(batch_shapes(CONFIG), schedule, CONFIG.chunk_tile)
    packed, rows = Packer(CONFIG).pack(schedule, shape)
    assert packed.shape == (packed_size(shape, CONFIG),)
    batch = unpack(packed, shape, CONFIG)  # type: ignore[arg-type]
    padding = CONFIG.max_num_seqs

    wanted = [decode.slot for decode in schedule.decodes]
    wanted += [padding] * (shape.num_decodes - len(wanted))
    np.testing.assert_array_equal(batch.decode_slots, wanted)
    assert int(batch.num_steps) == schedule.num_steps
    assert rows[: len(schedule.decodes)] == list(range(len(schedule.decodes)))

    seen: dict[int, list[int]] = {}
    numbers = {chunk.slot: number for number, chunk in enumerate(schedule.chunks)}
    for tile in range(shape.num_tiles):
        slot, length = int(batch.chunk_slots[tile]), int(batch.chunk_lens[tile])
        if slot == padding:
            assert length == 0
            continue
        tokens = seen.setdefault(slot, [])
        chunk = schedule.chunks[numbers[slot]]
        assert int(batch.chunk_starts[tile]) == chunk.start + len(tokens)
        tokens += np.asarray(batch.chunk_tokens[tile])[:length].tolist()
        is_last = len(tokens) == len(chunk.token_ids)
        following = (*chunk.token_ids, chunk.next_token_id)
        assert int(batch.chunk_next[tile]) == following[len(tokens)]
        assert bool(batch.chunk_samples[tile]) == (is_last and chunk.samples)
        is_scored = chunk.request.prompt_logprobs is not None and chunk.choice == 0
        assert bool(batch.chunk_scores[tile]) == is_scored
        if is_last:
            row = rows[len(schedule.decodes) + numbers[slot]]
            assert row == shape.num_decodes + tile
    assert seen == {chunk.slot: list(chunk.token_ids) for chunk in schedule.chunks}
    for each in (*schedule.decodes, *schedule.chunks):
        check_slot(batch, each)


def check_slot(batch: Batch, sequence: ScheduledSequence) -> None:
    slot, request, columns = sequence.slot, sequence.request, batch.slots
    np.testing.assert_array_equal(
        batch.page_table[slot][: len(sequence.page_ids)], sequence.page_ids
    )
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        assert getattr(columns, name)[slot] == getattr(request.sampling, name), name
    low, high = (int(word) for word in columns.seeds[slot])
    assert low + (high << 32) == request.sampling.seed
    assert int(columns.choices[slot]) == sequence.choice
    assert int(columns.prompt_lens[slot]) == len(request.prompt_token_ids)
    assert int(columns.min_tokens[slot]) == request.min_tokens
    end = len(request.prompt_token_ids) + request.max_tokens
    assert int(columns.end_positions[slot]) == end
    assert int(columns.num_biases[slot]) == len(request.sampling.logit_bias)
    assert int(columns.num_logprobs[slot]) == (-1 if request.logprobs is None else request.logprobs)
    ending = [token for token in np.asarray(columns.ending_ids[slot]).tolist() if token >= 0]
    assert ending == list(request.ending_token_ids)


def test_a_slot_is_written_anew_when_its_sequence_changes() -> None:
    """Pages of a running sequence only grow; another admission starts over."""
    packer, shape = Packer(CONFIG), BatchShape(8, 0)

    def table(admission: int, *page_ids: int) -> list[int]:
        decode = ScheduledSequence(
            Request(f"r{admission}", (1,), admission + 1), 0, 3, admission, 5, 1, page_ids, True
        )
        packed, _ = packer.pack(Schedule((decode,)), shape)
        batch = unpack(packed, shape, CONFIG)  # type: ignore[arg-type]
        check_slot(batch, decode)
        return np.asarray(batch.page_table[3])[: len(page_ids)].tolist()

    assert table(0, 5, 6) == [5, 6]
    assert table(0, 5, 6, 9) == [5, 6, 9]
    assert table(1, 7) == [7]
    assert table(2, 8, 4) == [8, 4]


def test_buffers_are_not_shared_between_steps() -> None:
    """A buffer may still be read by the device while the next one is written."""
    packer, shape = Packer(CONFIG), BatchShape(8, 0)
    decode = ScheduledSequence(Request("a", (1,), 1), 0, 3, 0, 5, 1, (2,), True)
    first, _ = packer.pack(Schedule((decode,)), shape)
    copy = first.copy()
    packer.pack(Schedule(), shape)
    np.testing.assert_array_equal(first, copy)


@given(schedules())
def test_the_smallest_shape_is_taken(schedule: Schedule) -> None:
    shapes = batch_shapes(CONFIG)
    tiles = sum(-(-len(chunk.token_ids) // CONFIG.chunk_tile) for chunk in schedule.chunks)
    shape = fitting_shape(shapes, schedule, CONFIG.chunk_tile)
    assert shape.num_tiles == min(s.num_tiles for s in shapes if s.num_tiles >= tiles)
    assert shape.num_decodes >= len(schedule.decodes)


@pytest.mark.parametrize("max_num_seqs", [1, 7, 8, 9, 64, 1000])
@pytest.mark.parametrize("max_num_batched_tokens", [16, 48, 512, 65536])
def test_every_schedule_fits_some_shape(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    config = tiny_config(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    shapes = batch_shapes(config)
    most = shapes[-1]
    assert len(shapes) <= 10
    assert most.num_decodes >= max_num_seqs
    assert most.num_tiles == max_num_batched_tokens // config.chunk_tile
    assert BatchShape(8, 0) in shapes
    assert all(shape.num_logits_rows >= 8 for shape in shapes)
