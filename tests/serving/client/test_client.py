"""The synchronous client, what it imports, and the stubs it stands on."""

import asyncio
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.address import check_address
from serving.client import (
    AsyncClient,
    Client,
    Delta,
    Finished,
    Message,
    ServerError,
    Started,
)
from serving.rpc.server import ServerOptions, serve
from serving.served_model import ServedModel
from tests.patience import HANG_SECONDS
from tests.serving.fakes import NUM_PAGES, FakeEngine, expected_token_ids, served_model

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def server_in_thread(engine: FakeEngine) -> Iterator[str]:
    ready = threading.Event()
    found: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        stop = asyncio.Event()

        def on_ready(port: int) -> None:
            found.append((port, asyncio.get_running_loop(), stop))
            ready.set()

        await serve(
            lambda: served_model(engine), ServerOptions(port=0), on_ready=on_ready, stop=stop
        )

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(timeout=HANG_SECONDS)
    port, loop, stop = found[0]
    try:
        yield f"127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=HANG_SECONDS)
        assert not thread.is_alive()


def test_the_synchronous_client() -> None:
    engine = FakeEngine()
    with server_in_thread(engine) as target, Client(target) as client:
        client.wait_until_serving(timeout=HANG_SECONDS)
        started, *deltas, finished = client.generate("hi", max_tokens=6, request_id="a")
        assert isinstance(started, Started)
        assert isinstance(finished, Finished)
        token_ids = [i for delta in deltas if isinstance(delta, Delta) for i in delta.token_ids]
        assert token_ids == expected_token_ids([256, 104, 105], 6)
        assert client.complete([Message("user", "x")], max_tokens=2).finished.reason == "length"
        choices = client.complete_choices("x", n=3, max_tokens=2, logprobs=1, stop=["?"])
        assert [done.finished.choice for done in choices] == [0, 1, 2]
        assert [len(done.logprobs) for done in choices] == [2, 2, 2]
        with pytest.raises(ValueError, match="n is 2: complete_choices"):
            client.complete("x", n=2)
        open_end = client.tokenize([Message("user", "x")], continue_final_message=True)
        assert client.detokenize(open_end) == "[user]x"
        assert client.detokenize(client.tokenize("häuser")) == "häuser"
        assert client.model_info().model_name == "fake"
        assert client.load().num_free_pages == NUM_PAGES
        assert client.is_serving(timeout=HANG_SECONDS)
        assert not client.abort("a")
        with pytest.raises(ServerError, match="no tokens") as raised:
            client.complete([])
        assert raised.value.code == "INVALID_ARGUMENT"


def test_leaving_the_loop_early_cancels_the_request() -> None:
    engine = FakeEngine(step_seconds=0.002)
    with server_in_thread(engine) as target, Client(target) as client:
        for event in client.generate("hi", max_tokens=400, request_id="left"):
            if isinstance(event, Delta):
                break
        # The id is free when the cancellation has arrived.
        for _ in range(200):
            if client.load().num_live_requests == 0:
                break
        assert client.complete("hi", max_tokens=1, request_id="left").text
    assert engine.aborted == ["left"]
    assert engine.stats.num_free_pages == NUM_PAGES


def test_prompts_that_mix_messages_and_ids_are_refused() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(ValueError, match="not both"):
        client.complete([Message("user", "x"), 3])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"temprature": 1.0}, TypeError, "no option 'temprature'; the nearest is 'temperature'"),
        ({"foo": 1}, TypeError, "no option 'foo'; the nearest is '"),
        ({"stop": ["\ud83d"]}, ValueError, r"^stop is not valid Unicode \(surrogates"),
        ({"request_id": "\ud83d"}, ValueError, "^request_id is not valid Unicode"),
        ({"stop": "one"}, ValueError, "^stop must be a list or its like, got 'one'"),
        ({"stop_token_ids": [-1]}, ValueError, r"^stop_token_ids: .* got \[-1\]"),
        ({"max_tokens": 1 << 40}, ValueError, "^max_tokens: .* got 1099511627776"),
        ({"n": {}}, TypeError, "^n: no mapping is wanted, got {}"),
        ({"logit_bias": [(1, 2.0)]}, TypeError, "^logit_bias: a mapping is wanted"),
        ({"template_arguments": {"a": "b"}}, ValueError, "is for a prompt of messages"),
        ({"timeout": "x"}, TypeError, "^timeout must be a number of seconds .*, got 'x'"),
        (
            {"timeout": math.inf},
            ValueError,
            "^timeout must be .* between 0 and 1000000000, got inf",
        ),
    ],
)
def test_options_that_no_request_can_hold(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """Both clients build requests with the same function; nothing is sent."""
    with Client("127.0.0.1:1") as client, pytest.raises(kind, match=message):
        client.complete_choices("x", **options)


def test_prompts_that_no_request_can_hold() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(ValueError, match=r"^the prompt is not valid Unicode"):
            client.complete("\ud83d")
        with pytest.raises(ValueError, match=r"^message 1 of the prompt is not valid Unicode"):
            client.complete([Message("user", "x"), Message("user", "\ud83d")])
        with pytest.raises(ValueError, match=r"^the prompt: .* got \[-1\]"):
            client.complete([-1])
        # An option of generate, but not of tokenize.
        with pytest.raises(TypeError, match="no option 'temperature'"):
            client.tokenize("x", temperature=1.0)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (b"hi", "b'hi'"),
        (bytearray(b"hi"), "bytearray(b'hi')"),
        (None, "None"),
        (7, "7"),
        (Message("user", "x"), repr(Message("user", "x"))),
        ({"role": "user"}, "{'role': 'user'}"),
        ({1, 2}, "{1, 2}"),
        ([1, 1.5], "1.5 as its item 1"),
        (["hi"], "'hi' as its item 0"),
        ([{"role": "user", "content": "x"}], "{'role': 'user', 'content': 'x'} as its item 0"),
    ],
)
def test_what_is_no_prompt_is_named_with_what_is_accepted(prompt: Any, named: str) -> None:
    wanted = (
        r"^the prompt must be a text \(str\), messages \(.*Message\) or token ids \(int\), got "
    )
    with Client("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match=wanted + re.escape(named) + "$"):
            client.complete(prompt)
        with pytest.raises(TypeError, match=wanted + re.escape(named) + "$"):
            client.tokenize(prompt)


def test_a_prompt_may_be_an_array() -> None:
    with server_in_thread(FakeEngine()) as target, Client(target) as client:
        of_list = client.complete([5, 6], max_tokens=2).token_ids
        assert client.complete(np.array([5, 6]), max_tokens=2).token_ids == of_list  # pyright: ignore[reportArgumentType]
        assert client.complete(range(5, 7), max_tokens=2).token_ids == of_list


def test_other_arguments_that_no_message_can_hold() -> None:
    with Client("127.0.0.1:1") as client:
        wrong: Any
        for wrong in (b"x", None):
            with pytest.raises(TypeError, match=f"message 0 of the prompt: .* str, got {wrong!r}"):
                client.complete([Message("user", wrong)])
        for wrong in ("ab", b"ab", None, 3):
            with pytest.raises(TypeError, match=f"^token_ids must be several .* got {wrong!r}$"):
                client.detokenize(wrong)
        with pytest.raises(ValueError, match=r"^token_ids: .* got \[-1\]"):
            client.detokenize([-1])
        for wrong in (b"a", None, 3):
            with pytest.raises(TypeError, match=f"^request_id must be a str, got {wrong!r}$"):
                client.abort(wrong)
        with pytest.raises(ValueError, match=r"^only a text or messages .* got \[1\]$"):
            client.tokenize([1])  # pyright: ignore[reportArgumentType]
        for wrong in ("x", None, True):
            with pytest.raises(TypeError, match=f"^timeout must be .*, got {wrong!r}$"):
                client.wait_until_serving(wrong)
        for wrong in (-1, math.nan, 1 << 70):
            with pytest.raises(ValueError, match=f"^timeout must be .*, got {wrong}$"):
                client.is_serving(timeout=wrong)


@pytest.mark.parametrize(
    "target",
    ["", "nonsense:abc", "localhost", ":50051", "a:0", "a:65536", "a:٣", "http://a:1", "a b:1"],
)
def test_what_is_no_address_is_refused_before_any_call(target: str) -> None:
    wanted = r"^target must be HOST:PORT with a port between 1 and 65535, got "
    for client in (Client, AsyncClient):
        with pytest.raises(ValueError, match=wanted + re.escape(repr(target)) + "$"):
            client(target)
        with pytest.raises(TypeError, match=wanted.replace(", got", ", as a str, got") + "None$"):
            client(None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("target", ["127.0.0.1:1", "[::1]:65535", "my_host-1.example.org:50051"])
def test_addresses(target: str) -> None:
    assert check_address("target", target) == target


def test_whether_a_server_serves() -> None:
    started, go = threading.Event(), threading.Event()
    listening: list[int] = []

    def load() -> ServedModel:
        assert go.wait(timeout=HANG_SECONDS)
        return served_model(FakeEngine())

    async def main() -> None:
        stop = asyncio.Event()

        def on_listening(port: int) -> None:
            listening.append(port)
            started.set()

        async def check() -> None:
            async with AsyncClient(f"127.0.0.1:{listening[0]}") as client:
                assert not await client.is_serving(timeout=HANG_SECONDS)
                go.set()
                await client.wait_until_serving(timeout=HANG_SECONDS)
                assert await client.is_serving(timeout=HANG_SECONDS)
                assert (await client.model_info(timeout=HANG_SECONDS)).model_name == "fake"
            stop.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                serve(load, ServerOptions(port=0), on_listening=on_listening, stop=stop)
            )
            assert await asyncio.to_thread(started.wait, 20)
            tasks.create_task(check())

    asyncio.run(main())


def test_nobody_there() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            client.is_serving(timeout=5)
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            client.load()
        with pytest.raises(TimeoutError, match=r"0\.2 s"):
            client.wait_until_serving(timeout=0.2)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, *arguments),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_neither_client_nor_server_imports_jax() -> None:
    code = "import sys, serving.client, serving.rpc.server; assert 'jax' not in sys.modules"
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_committed_stubs_are_what_the_proto_says() -> None:
    result = python("tools/build_proto.py", "--check")
    assert result.returncode == 0, result.stderr
