"""From a call's result on the device to its output on the host, and no more than was asked for."""

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
from jaxinfer.step import NO_TOKEN, StepResult


def read_result(schedule: Schedule, result: StepResult, rows: list[int]) -> StepOutput:
    """What a call of ``schedule`` yielded; ``rows`` are the logits rows of its sequences."""
    columns: list[list[int]] = np.asarray(result.tokens).T.tolist()
    logprobs = None
    if any(s.request.logprobs is not None for s in chain(schedule.decodes, schedule.chunks)):
        logprobs = jax.tree.map(np.asarray, result.logprobs)
    outputs = []
    for sequence, row in zip(chain(schedule.decodes, schedule.chunks), rows, strict=True):
        token_ids = ()
        if sequence.samples:
            column = columns[row]
            # Where a row ends, the rest of its column is empty.
            end = column.index(NO_TOKEN) if NO_TOKEN in column else len(column)
            token_ids = tuple(column[:end])
        wanted = sequence.request.logprobs
        entries = ()
        if logprobs is not None and wanted is not None and token_ids:
            # A call of several steps is made only where nobody wants them.
            entries = (_entry(logprobs, (row,), token_ids[-1], wanted),)
        outputs.append(SequenceOutput(token_ids, entries))
    if any(_is_scored(chunk) for chunk in schedule.chunks):
        scores = jax.tree.map(np.asarray, result.prompt_logprobs)
        _add_prompt_logprobs(schedule, outputs, scores)
    return StepOutput(tuple(outputs))


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
            outputs[number] = SequenceOutput(
                outputs[number].token_ids, outputs[number].logprobs, entries
            )
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
