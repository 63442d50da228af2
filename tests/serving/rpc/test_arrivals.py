"""Calls that wait for their message, and calls that are too many."""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from serving.client import AsyncClient, ServerError
from serving.loop import NotServingError
from serving.rpc import server
from serving.rpc.arrivals import MAX_WAITING
from serving.rpc.service import InferenceService
from serving.rpc.statuses import RETRY_KEY, RETRY_MILLISECONDS
from tests.patience import HANG_SECONDS
from tests.serving.fakes import FakeEngine
from tests.serving.rpc.test_server import SERVING, health, health_stub
from tests.serving.running import run, running_server, until

GENERATE = "/jaxinfer.v1.Inference/Generate"
CHECK = "/grpc.health.v1.Health/Check"


async def codes(calls: Iterable[Any]) -> list[grpc.StatusCode]:
    return [await call.code() for call in calls]


@pytest.mark.parametrize("method", [GENERATE, "/jaxinfer.v1.Inference/GetLoad", CHECK])
def test_a_call_whose_message_does_not_come_ends(method: str) -> None:
    async def test() -> None:
        async with (
            running_server(FakeEngine(), message_seconds=0.05) as (target, _),
            grpc.aio.insecure_channel(target) as channel,
        ):
            call = channel.stream_stream(method)()
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await call.details() == "the call's message did not come in 0.05 s"

    run(test())


@pytest.mark.parametrize("method", [GENERATE, CHECK])
def test_a_call_that_ends_without_a_message_is_refused(method: str) -> None:
    async def test() -> None:
        async with (
            running_server(FakeEngine()) as (target, _),
            grpc.aio.insecure_channel(target) as channel,
        ):
            call = channel.stream_stream(method)(iter(()))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert await call.details() == "the call has no message"

    run(test())


@pytest.mark.parametrize("method", [GENERATE, CHECK])
def test_calls_without_a_message_shut_nobody_out(method: str) -> None:
    async def test() -> None:
        async with (
            running_server(FakeEngine()) as (target, _),
            grpc.aio.insecure_channel(target) as channel,
            AsyncClient(target) as client,
        ):
            calls = [channel.stream_stream(method)() for _ in range(4200)]
            # All but a few are given up, with a hint to try again.
            await until(lambda: sum(call.done() for call in calls) == len(calls) - MAX_WAITING)
            given_up = [call for call in calls if call.done()]
            assert set(await codes(given_up)) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert RETRY_KEY in dict(await given_up[0].trailing_metadata())
            assert await health(channel, "") == SERVING
            assert (await client.complete("abc", max_tokens=3)).text
            assert (await client.load()).accepting
            for call in calls:
                call.cancel()

    run(test())


def test_health_is_told_when_there_are_too_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONCURRENT_CALLS", 3)
    monkeypatch.setattr(server, "MAX_OTHER_CALLS", 2)

    async def test() -> None:
        engine = FakeEngine(endless_at=400)
        async with (
            running_server(engine) as (target, _),
            grpc.aio.insecure_channel(target) as channel,
            AsyncClient(target) as client,
        ):
            running = [client.generate("abc", max_tokens=400) for _ in range(3)]
            for events in running:
                await anext(events)
            with pytest.raises(ServerError, match="3 calls are in progress, the limit is 3") as e:
                await client.load()
            assert e.value.code == "RESOURCE_EXHAUSTED"
            assert await health(channel, "") == SERVING
            # Watchers are bounded too, and do not shut out our own calls.
            watches = [health_stub(channel).Watch(health_pb2.HealthCheckRequest()) for _ in "ab"]
            for watch in watches:
                assert (await watch.read()).status == SERVING
            with pytest.raises(grpc.aio.AioRpcError, match="2 calls are in progress"):
                await health(channel, "")
            reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
            call = channel.stream_stream(reflection)(iter((b"\x3a\x00",)))
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            for events in running:
                await events.aclose()
            async with asyncio.timeout(HANG_SECONDS):
                while not await loads(client):
                    await asyncio.sleep(0.01)

    run(test())


async def loads(client: AsyncClient) -> bool:
    try:
        return (await client.load()).accepting
    except ServerError:
        return False


def test_too_many_requests_are_refused_before_their_message_comes() -> None:
    async def test() -> None:
        engine = FakeEngine(endless_at=400)
        async with (
            running_server(engine, max_live_requests=2) as (target, _),
            grpc.aio.insecure_channel(target) as channel,
            AsyncClient(target) as client,
        ):
            running = [client.generate("abc", max_tokens=400) for _ in range(2)]
            for events in running:
                await anext(events)
            # No message is sent: nothing of it can have been read.
            call = channel.stream_stream(GENERATE)()
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await call.details() == "2 requests are live, the limit is 2"
            hint = int(dict(await call.trailing_metadata())[RETRY_KEY])
            assert RETRY_MILLISECONDS[0] <= hint <= RETRY_MILLISECONDS[1]
            # What tells of the load, and ends it, goes on.
            assert (await client.load()).num_live_requests == 2
            for events in running:
                await events.aclose()
            await until(lambda: engine.stats.num_running == 0)
            assert (await client.complete("abc", max_tokens=3)).text

    run(test())


def test_requests_whose_prompts_are_tokenized_count(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def slow(*_: Any, **__: Any) -> tuple[int, ...]:
        entered.set()
        await go_on.wait()
        return (1,)

    async def test() -> None:
        async with (
            running_server(FakeEngine(), max_live_requests=1) as (target, _),
            AsyncClient(target) as client,
        ):
            first = asyncio.create_task(client.complete("abc", max_tokens=3))
            await entered.wait()
            with pytest.raises(ServerError, match="1 requests are live, the limit is 1"):
                await client.complete("abc", max_tokens=3)
            go_on.set()
            assert (await first).text

    monkeypatch.setattr("serving.rpc.service.InferenceService._encode", slow)
    run(test())


def test_while_loading_messages_are_not_read() -> None:
    service = InferenceService()
    try:
        with pytest.raises(NotServingError, match="being loaded"):
            service.check_generate()
    finally:
        service.close()
