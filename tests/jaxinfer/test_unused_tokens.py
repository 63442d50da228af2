"""Rows of the embedding that no token has: never chosen, whatever a request asks for."""

import dataclasses
from typing import Any

import jax
import pytest

from jaxinfer.config import DraftModel
from jaxinfer.engine import Engine
from jaxinfer.request import Request, SamplingParams
from jaxinfer.schedule import RequestOutput
from tests.jaxinfer.tiny import (
    CPU_DTYPES,
    few_shapes,
    random_parameters,
    random_request,
    tiny_config,
    tiny_model,
    tiny_spec,
)
from tests.thorough import thorough_beyond

# Of 96 rows a third is no token, with holes among the others.
UNUSED = ((0, 1), (7, 19), (70, 96))
IS_UNUSED = {token_id for first, end in UNUSED for token_id in range(first, end)}
MODEL = tiny_model(unused_tokens=UNUSED)

SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0},
    {"temperature": 1.5, "top_k": 90},
    {"temperature": 1.5, "top_p": 0.99, "repetition_penalty": 1.5},
    {"temperature": 1.0, "min_p": 0.01, "presence_penalty": 1.0},
    {"temperature": 0.5, "logit_bias": ((8, 100.0), (69, 5.0))},
]


def requests() -> list[Request]:
    made = []
    for number, fields in enumerate(SAMPLING):
        request = random_request(f"r{number}", 12, 40, seed=number)
        prompt = tuple(20 + token_id % 50 for token_id in request.prompt_token_ids)
        sampling = SamplingParams(seed=number, **fields)
        made.append(
            dataclasses.replace(
                request, prompt_token_ids=prompt, sampling=sampling, logprobs=20, prompt_logprobs=20
            )
        )
    return made


def outputs_of(engine: Engine) -> list[RequestOutput]:
    for request in requests():
        engine.add(request)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs


SUBJECT = "more ways to draft"
DRAFTS = [None, "ngram", "layers", "model"]


@pytest.mark.parametrize("draft", thorough_beyond(DRAFTS[1:2], DRAFTS, "more ways to draft"))
@pytest.mark.parametrize(
    "verify", thorough_beyond(["exact"], ["exact", "rejection"], "more ways to draft")
)
def test_they_are_in_no_answer(draft: str | None, verify: Any) -> None:
    """Nor among the most likely ones; without the mask a third of all tokens were such rows."""
    config = tiny_config(
        draft=draft, num_drafts=3, num_draft_layers=int(draft == "layers"), verify=verify
    )
    drafter = DraftModel(MODEL, CPU_DTYPES) if draft == "model" else None
    engine = Engine(tiny_spec(config, MODEL, draft=drafter))
    engine.compile(shapes=few_shapes(engine))
    parameters = jax.device_put(random_parameters(tiny_model()))
    engine.start(parameters, parameters if drafter else None)
    outputs = outputs_of(engine)
    tokens = [token_id for output in outputs for token_id in output.token_ids]
    assert len(tokens) == 40 * len(SAMPLING)
    assert not IS_UNUSED & {*tokens}
    told = [entry for output in outputs for entry in (*output.logprobs, *output.prompt_logprobs)]
    entries = [entry for entry in told if entry]
    assert len(entries) == (40 + 11) * len(SAMPLING)
    assert all(not IS_UNUSED & {token_id for token_id, _ in entry.top} for entry in entries)


def test_without_the_mask_they_are_chosen() -> None:
    engine = Engine(tiny_spec(tiny_config()))
    engine.compile(shapes=engine.shapes[-1:])
    engine.start(jax.device_put(random_parameters(tiny_model())))
    tokens = [token_id for output in outputs_of(engine) for token_id in output.token_ids]
    assert IS_UNUSED & {*tokens}


def test_they_cannot_be_asked_for() -> None:
    engine = Engine(tiny_spec(tiny_config(), MODEL))
    request = random_request("a", 3, 3, seed=0)
    with pytest.raises(ValueError, match=r"prompt token ids must be in \[0, 69\], got 70"):
        engine.add(dataclasses.replace(request, prompt_token_ids=(1, 70)))


@pytest.mark.parametrize("ranges", [((3, 3),), ((5, 7), (6, 9)), ((90, 97),), ((-1, 2),)])
def test_ranges_that_cannot_be(ranges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="unused_tokens must be ranges in order"):
        tiny_model(unused_tokens=ranges)
    with pytest.raises(ValueError, match="are all 96 tokens there are"):
        tiny_model(unused_tokens=((0, 50), (50, 96)))
