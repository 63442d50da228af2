"""The real thing: scripts/serve.py as a process, the default model, many streams over gRPC."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.client import AsyncClient, Client
from serving.client.events import Completion
from serving.client.options import GenerateOptions, Message
from tests.patience import HANG_SECONDS

ROOT = Path(__file__).parent.parent
PROMPTS = json.loads((ROOT / "tests/data/smollm2_f32.json").read_text())["prompts"]
NUM_STREAMS = 16

pytestmark = [pytest.mark.model, pytest.mark.thorough("the default model served")]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address; SIGTERM must end it cleanly."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "serve.py"), "--cpu", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error::UserWarning"},
    )
    assert process.stdout
    try:
        line = process.stdout.readline()
        match = re.fullmatch(r"SERVING smollm2-135m-instruct .* at (127\.0\.0\.1:\d+)\n", line)
        assert match, line
        yield process, match.group(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=HANG_SECONDS) == 0
        assert process.stdout.read() == "stopped\n"
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def options_of(stream: int) -> GenerateOptions:
    """Every other stream is sampled, with its own seed and filters."""
    options: GenerateOptions = {"max_tokens": 8 + stream, "ignore_eos": True}
    if stream % 2:
        options |= {"temperature": 0.7 + 0.05 * stream, "seed": stream, "top_p": 0.95}
    if stream % 4 == 3:
        options |= {"top_k": 20, "min_p": 0.02, "frequency_penalty": 0.4}
    if stream % 5 == 2:
        options |= {"repetition_penalty": 1.2, "logit_bias": {198: -3.0}, "priority": stream}
    return options


def prompt_of(stream: int) -> list[int]:
    """Prompts of different lengths, across page and tile borders."""
    ids = PROMPTS[stream % len(PROMPTS)]["prompt_ids"]
    return ids * (1 + stream // 3)


def test_concurrent_streams_equal_their_solo_runs(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    _, target = server

    async def all_streams() -> tuple[list[Completion], list[Completion]]:
        async with AsyncClient(target) as client:
            solo = [
                await client.complete(prompt_of(i), **options_of(i)) for i in range(NUM_STREAMS)
            ]
            together = await asyncio.gather(
                *(client.complete(prompt_of(i), **options_of(i)) for i in range(NUM_STREAMS))
            )
            load = await client.load()
            assert load.num_free_pages == load.num_pages
            return solo, list(together)

    solo, together = asyncio.run(all_streams())
    for i, (alone, beside) in enumerate(zip(solo, together, strict=True)):
        assert alone.token_ids == beside.token_ids, f"stream {i}"
        assert alone.text == beside.text
        assert len(alone.token_ids) == 8 + i
    assert len({completion.token_ids for completion in solo}) == NUM_STREAMS


def test_choices_stop_strings_and_logprobs(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    options: GenerateOptions = {"max_tokens": 40, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    with Client(server[1]) as client:
        whole = client.complete_choices(prompt_of(1), **options | {"n": 4})
        assert len({completion.token_ids for completion in whole}) == 4
        assert whole[0].token_ids == client.complete(prompt_of(1), **options).token_ids
        # The end of the text stays where it was, and nothing of the stop string gets out.
        text = whole[0].text
        stop = text[len(text) // 2 : len(text) // 2 + 7]
        before = text[: text.index(stop)]
        cut = client.complete(prompt_of(1), **options | {"stop": ["never this", stop]})
        assert (cut.text, cut.finished.reason) == (before, "stop")
        assert cut.finished.stop_string == stop
        assert cut.token_ids == whole[0].token_ids[: len(cut.token_ids)]

        scored = client.complete(prompt_of(1), **options | {"logprobs": 3, "prompt_logprobs": 1})
        assert scored.token_ids == whole[0].token_ids
        assert len(scored.started.prompt_logprobs) == len(prompt_of(1))
        load = client.load()
        assert load.num_cached_tokens > 0
        assert load.num_free_pages == load.num_pages


def test_a_chat_equals_the_reference(server: tuple[subprocess.Popen[str], str]) -> None:
    chat = next(prompt for prompt in PROMPTS if prompt["name"] == "chat_gravity")
    messages = [Message(**message) for message in chat["messages"]]
    with Client(server[1]) as client:
        completion = client.complete(messages, max_tokens=24)
    assert list(completion.token_ids) == chat["greedy_ids"][:24]
    assert chat["greedy_text"].startswith(completion.text)
    assert completion.finished.usage.num_prompt_tokens == len(chat["prompt_ids"])
    assert completion.finished.timings.queue_seconds is not None


def test_a_cancelled_stream_gives_its_pages_back(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    with Client(server[1]) as client:
        events = client.generate(prompt_of(0), max_tokens=4000, ignore_eos=True)
        for _ in range(5):
            next(events)
        assert client.load().num_free_pages < client.load().num_pages
        events.close()
        # The next answer comes after the loop has heard of the cancellation.
        for _ in range(100):
            client.complete(prompt_of(0), max_tokens=1)
            if client.load().num_free_pages == client.load().num_pages:
                break
        else:
            pytest.fail("the cancelled stream still holds pages")
