"""From a call's result on the device to its output on the host, and no more than was asked for."""

from dataclasses import replace
from itertools import chain

import jax
import numpy as np

from jaxinfer.logprobs import LogprobColumns
from jaxinfer.schedule import (
    Schedule,
    ScheduledSequence,
    SequenceOutput,
    StepOutput,
    TokenLogprobs,
)
from jaxinfer.step_state import NO_TOKEN, StepResult


def read_result(
    schedule: Schedule, result: StepResult, rows: list[int], num_drafts: int = 0
) -> StepOutput:
    """Returns the outputs of a call; ``rows`` are the first logits rows of its sequences.

    A decode has ``num_drafts`` rows more, of which those that are no new token are empty.
    """
    columns: list[list[int]] = np.asarray(result.tokens).T.tolist()
    logprobs = None
    if any(s.request.logprobs is not None for s in chain(schedule.decodes, schedule.chunks)):
        logprobs = jax.tree.map(np.asarray, result.logprobs)
    num_drafted = np.asarray(result.num_drafted).sum(axis=0).tolist()
    draft_lens = np.asarray(result.draft_lens).tolist() if result.draft_lens.size else []
    num_decode_rows = len(num_drafted) * (num_drafts + 1)
    outputs = []
    for number, (sequence, row) in enumerate(
        zip(chain(schedule.decodes, schedule.chunks), rows, strict=True)
    ):
        is_decode = number < len(schedule.decodes)
        width = num_drafts + 1 if is_decode else 1
        found = _new_tokens(columns[row : row + width]) if sequence.samples else []
        token_ids = tuple(token_id for token_id, _ in found)
        wanted = sequence.request.logprobs
        entries = ()
        if logprobs is not None and wanted is not None:
            # A call of several steps is made only where nobody wants them.
            entries = tuple(
                _entry(logprobs, (row + offset,), token_id, wanted) for token_id, offset in found
            )
        output = SequenceOutput(token_ids, entries)
        if is_decode and num_drafts:
            num_steps = sum(offset == 0 for _, offset in found)
            num_accepted = len(token_ids) - num_steps
            output = replace(output, num_drafted=num_drafted[number], num_accepted=num_accepted)
        if draft_lens:
            # Of decodes, then of tiles, of which a chunk's last one counts.
            at = number if is_decode else len(num_drafted) + row - num_decode_rows
            output = replace(output, num_drafter_kv_tokens=draft_lens[at])
        outputs.append(output)
    if any(_is_scored(chunk) for chunk in schedule.chunks):
        scores = jax.tree.map(np.asarray, result.prompt_logprobs)
        _add_prompt_logprobs(schedule, outputs, scores)
    return StepOutput(tuple(outputs))


def _new_tokens(columns: list[list[int]]) -> list[tuple[int, int]]:
    """Step by step the tokens of a sequence's rows, and which row each is from."""
    return [
        (token_id, row)
        for step in zip(*columns, strict=True)
        for row, token_id in enumerate(step)
        if token_id != NO_TOKEN
    ]


def _is_scored(chunk: ScheduledSequence) -> bool:
    return chunk.request.prompt_logprobs is not None and chunk.choice == 0


def _add_prompt_logprobs(
    schedule: Schedule, outputs: list[SequenceOutput], scores: LogprobColumns
) -> None:
    tile, size = 0, scores.logprob.shape[1]
    for number, chunk in enumerate(schedule.chunks, start=len(schedule.decodes)):
        if _is_scored(chunk):
            prompt = chunk.request.prompt_token_ids
            wanted = chunk.request.prompt_logprobs or 0
            following = prompt[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
            entries = tuple(
                _entry(scores, (tile + i // size, i % size), token_id, wanted)
                for i, token_id in enumerate(following)
            )
            outputs[number] = replace(outputs[number], prompt_logprobs=entries)
        tile += -(-chunk.num_tokens // size)


def _entry(
    columns: LogprobColumns, index: tuple[int, ...], token_id: int, num_top: int
) -> TokenLogprobs:
    top_ids = columns.top_ids[index][:num_top].tolist()
    top_logprobs = columns.top_logprobs[index][:num_top].tolist()
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(columns.logprob[index]),
        rank=int(columns.rank[index]),
        top=tuple(zip(top_ids, top_logprobs, strict=True)),
    )
