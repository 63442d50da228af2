"""Receiving messages: what is refused is let go of first."""

import asyncio
import threading
import weakref
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest

from jaxinfer.request import LIMITS
from serving.client import AsyncClient, ServerError
from serving.loop import RequestRefusedError
from serving.rpc import reception
from serving.rpc.arrivals import Arrivals
from serving.rpc.service import _checked_call
from tests.patience import HANG_SECONDS
from tests.serving.fakes import ByteTokenizer, FakeEngine
from tests.serving.running import run, running_server, until

MOST_CHARACTERS = int(LIMITS["prompt_characters"].high)


class Held:
    """A message, of which a reference can be kept that does not hold it."""


@dataclass
class Context:
    """A call whose abort sees whether its message is still there."""

    data: bytes
    reference: weakref.ref[Held] | None = None
    was_held: bool | None = None

    def decode(self, data: bytes) -> Held:
        message = Held()
        self.reference = weakref.ref(message)
        if data == b"no message":
            raise RequestRefusedError("no message")
        return message

    async def read(self) -> bytes:
        return self.data

    async def abort(self, *_: object, **__: object) -> None:
        assert self.reference is not None
        self.was_held = self.reference() is not None
        raise grpc.aio.AbortError


@pytest.mark.parametrize("where", ["decoding", "fields", "method"])
def test_a_message_is_let_go_of_before_its_refusal_is_sent(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(message: Any, *_: Any) -> None:
        if where == "fields":
            raise ValueError("no")

    async def method(self: Any, request: Any, context: Any) -> None:
        raise RequestRefusedError("no")

    checked = _checked_call(method)

    async def answer(request: Any, context: Any) -> None:
        work = checked(None, request, context)
        del request
        await work

    monkeypatch.setattr("serving.rpc.service.refuse_unsupported", check)
    context = Context(b"no message" if where == "decoding" else b"")

    async def test() -> None:
        with pytest.raises(grpc.aio.AbortError):
            await reception._received(
                context.decode, answer, Arrivals(1, HANG_SECONDS), check=lambda: None
            )(None, cast(Any, context))

    run(test())
    assert context.was_held is False


def test_prompts_of_limited_characters_are_tokenized_and_short_ones_do_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release, encode = threading.Event(), ByteTokenizer.encode
    started: list[int] = []

    def slow(self: Any, text: str, *arguments: Any, **options: Any) -> list[int]:
        if len(text) > 100_000:
            started.append(len(text))
            assert release.wait(timeout=HANG_SECONDS)
            return [1]
        return encode(self, text, *arguments, **options)

    async def test() -> None:
        async with running_server(FakeEngine()) as (target, _), AsyncClient(target) as client:
            long = "x" * (MOST_CHARACTERS - 100)
            calls = [asyncio.create_task(client.tokenize(long)) for _ in range(5)]
            # Four of them fit, whatever the order in which they come.
            done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            with pytest.raises(
                ServerError, match=r"characters of prompts .* the limit is"
            ) as raised:
                await done.pop()
            assert raised.value.code == "RESOURCE_EXHAUSTED"
            assert len(await client.tokenize("x" * 2700)) == 2701
            assert (await client.complete("x" * 300, max_tokens=3)).text
            await until(lambda: len(started) == 1)
            release.set()
            assert await asyncio.gather(*waiting) == [(1,)] * 4

    monkeypatch.setattr(ByteTokenizer, "encode", slow)
    run(test())


def test_a_prompt_too_long_for_the_context_by_its_length_is_not_tokenized() -> None:
    async def test() -> None:
        async with running_server(FakeEngine()) as (target, _), AsyncClient(target) as client:
            with pytest.raises(ServerError, match=r"4194304 characters, max_model_len") as raised:
                await client.complete("x" * MOST_CHARACTERS)
            assert raised.value.code == "INVALID_ARGUMENT"
            # Counting the tokens of such a text is no mistake.
            assert len(await client.tokenize("x" * 1000)) == 1001

    run(test())


@pytest.mark.parametrize("method", ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"])
def test_other_services_take_small_messages(method: str) -> None:
    async def test() -> None:
        async with (
            running_server(FakeEngine()) as (target, _),
            grpc.aio.insecure_channel(target) as channel,
        ):
            call = channel.unary_stream(method)(b"\x0a\x80\x80\x40" + b"x" * (1 << 20))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "has 1048580 bytes, the limit of" in await call.details()

    run(test())
