"""The server's life: listening, loading, serving, failing, draining."""

import asyncio
import gc
import os
import signal
import socket
import threading
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serving.client import AsyncClient, Finished, ServerError
from serving.loop import EngineFailedError, EngineStuckError
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.rpc.server import LoadInterruptedError, ServerOptions, run_server, serve
from serving.rpc.service import _checked_call
from serving.served_model import ServedModel
from tests.patience import HANG_SECONDS
from tests.serving.fakes import NUM_PAGES, FakeEngine, served_model
from tests.serving.running import run, running_client, running_server, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel: grpc.aio.Channel, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health_stub(channel).Check(request, timeout=HANG_SECONDS)).status


def health_stub(channel: Any) -> Any:
    """The type declarations of these packages know no asyncio channels."""
    return health_pb2_grpc.HealthStub(channel)


def test_health_says_not_serving_until_the_model_is_loaded() -> None:
    async def test() -> None:
        loaded, stop = threading.Event(), asyncio.Event()
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def load() -> ServedModel:
            assert loaded.wait(timeout=HANG_SECONDS)
            return served_model(FakeEngine())

        server = asyncio.create_task(
            serve(load, ServerOptions(port=0), on_listening=listening.set_result, stop=stop)
        )
        target = f"127.0.0.1:{await listening}"
        async with grpc.aio.insecure_channel(target) as channel, AsyncClient(target) as client:
            for service in ("", "jaxinfer.v1.Inference"):
                assert await health(channel, service) == NOT_SERVING
            with pytest.raises(ServerError, match="being loaded") as raised:
                await client.complete("abc")
            assert raised.value.code == "UNAVAILABLE"
            with pytest.raises(TimeoutError):
                await client.wait_until_serving(timeout=0.15)
            loaded.set()
            await client.wait_until_serving(timeout=HANG_SECONDS)
            for service in ("", "jaxinfer.v1.Inference"):
                assert await health(channel, service) == SERVING
            assert (await client.complete("abc", max_tokens=3)).text
        stop.set()
        await server

    run(test())


def reflection_stub(channel: Any) -> Any:
    return reflection_pb2_grpc.ServerReflectionStub(channel)


def test_reflection_lists_the_service() -> None:
    async def test() -> None:
        async with (
            running_server(FakeEngine()) as (target, _),
            grpc.aio.insecure_channel(target) as channel,
        ):
            stub = reflection_stub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            call = stub.ServerReflectionInfo(iter((request,)))
            names = {s.name for s in (await call.read()).list_services_response.service}
            call.cancel()
        assert {"jaxinfer.v1.Inference", "grpc.health.v1.Health"} <= names

    run(test())


def test_a_failing_load_is_raised() -> None:
    def load() -> ServedModel:
        raise FileNotFoundError("no such model")

    with pytest.raises(FileNotFoundError, match="no such model"):
        run(serve(load, ServerOptions(port=0), stop=asyncio.Event()))


def test_stopping_while_the_model_is_loaded() -> None:
    release = threading.Event()

    def load() -> ServedModel:
        release.wait(timeout=HANG_SECONDS)
        return served_model(FakeEngine())

    async def test() -> None:
        stop = asyncio.Event()
        with pytest.raises(LoadInterruptedError):
            await serve(load, ServerOptions(port=0), on_listening=lambda _: stop.set(), stop=stop)

    run(test())
    release.set()


def test_a_port_in_use_is_one_clear_error() -> None:
    def load() -> ServedModel:
        raise AssertionError("the model was loaded before the port was known to be free")

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on port {port} of 127.0.0.1: .* in use"):
            run(serve(load, ServerOptions(port=port), stop=asyncio.Event()))


def test_a_second_server_on_the_same_port_is_refused() -> None:
    async def test() -> None:
        async with running_server(FakeEngine()) as (target, _):
            port = int(target.rpartition(":")[2])
            with pytest.raises(OSError, match="in use"):
                await serve(
                    lambda: served_model(FakeEngine()),
                    ServerOptions(port=port),
                    stop=asyncio.Event(),
                )

    run(test())


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.005)
        async with running_server(engine) as (target, stop), AsyncClient(target) as client:
            events = client.generate("abc", max_tokens=60)
            await anext(events)
            stop.set()
            await asyncio.sleep(0.05)
            with pytest.raises(ServerError, match="shutting down") as raised:
                await client.complete("abc")
            assert raised.value.code == "UNAVAILABLE"
            assert not (await client.load()).accepting
            with pytest.raises(TimeoutError):
                await client.wait_until_serving(timeout=0.05)
            rest = [event async for event in events]
        assert isinstance(rest[-1], Finished)
        assert (rest[-1].reason, rest[-1].usage.num_output_tokens) == ("length", 60)
        assert engine.stats.num_free_pages == NUM_PAGES

    run(test())


def test_after_the_grace_the_rest_is_aborted() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.01)
        async with (
            running_server(engine, grace_seconds=0) as (target, stop),
            AsyncClient(target) as client,
        ):
            events = client.generate("abc", max_tokens=500)
            await anext(events)
            stop.set()
            rest = [event async for event in events]
        assert isinstance(rest[-1], Finished)
        assert rest[-1].reason == "abort"
        assert engine.stats.num_free_pages == NUM_PAGES

    run(test())


def test_a_failing_engine_fails_its_streams_and_ends_the_server() -> None:
    statuses: list[int] = []

    async def test() -> None:
        async with (
            running_server(FakeEngine(fail_after_steps=5)) as (target, _),
            AsyncClient(target) as client,
            grpc.aio.insecure_channel(target) as channel,
        ):
            watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
            statuses.append((await watch.read()).status)
            calls = [client.complete([i], max_tokens=100) for i in range(3)]
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(error, ServerError)
                assert error.code == "INTERNAL"
                assert "device" not in error.message
            # Nobody stops the server here: it notices by itself.
            statuses.append((await watch.read()).status)
            watch.cancel()

    with pytest.raises(EngineFailedError, match="the device is gone"):
        run(test())
    assert statuses == [SERVING, NOT_SERVING]


def test_a_step_that_never_returns_fails_its_streams_and_ends_the_server() -> None:
    statuses: list[int] = []

    async def test() -> None:
        engine = FakeEngine()
        engine.gate.clear()
        async with (
            running_server(engine, step_timeout=0.05) as (target, _),
            AsyncClient(target) as client,
            grpc.aio.insecure_channel(target) as channel,
        ):
            watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
            statuses.append((await watch.read()).status)
            with pytest.raises(ServerError, match="not ended a step") as raised:
                await client.complete("abc")
            assert raised.value.code == "INTERNAL"
            # Nobody stops the server here, and the engine is stuck until the test is over.
            statuses.append((await watch.read()).status)
            watch.cancel()
            with pytest.raises(ServerError):
                await client.complete("abc")

    with pytest.raises(EngineStuckError, match="not ended a step"):
        run(test())
    assert statuses == [SERVING, NOT_SERVING]


def test_an_error_inside_is_internal_and_tells_no_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> str:
        raise ValueError("somebody's text")

    async def test() -> None:
        async with running_client(FakeEngine()) as client:
            monkeypatch.setattr("tests.serving.fakes.ByteTokenizer.token_bytes", broken)
            with pytest.raises(ServerError) as raised:
                await client.complete("abc", max_tokens=100)
            assert raised.value.code == "INTERNAL"
            assert "somebody" not in raised.value.message
            # That was one request's misfortune, not the engine's.
            monkeypatch.undo()
            assert (await client.complete("abc", max_tokens=3)).text

    run(test())


@pytest.mark.parametrize("num_signals", [1, 2])
def test_signals_drain(num_signals: int) -> None:
    """The first signal lets what runs finish, the second one ends it."""
    engine = FakeEngine(step_seconds=0.005)
    results: list[str] = []
    client_thread: list[threading.Thread] = []

    async def client(port: int) -> None:
        async with asyncio.timeout(HANG_SECONDS), AsyncClient(f"127.0.0.1:{port}") as client:
            events = client.generate("abc", max_tokens=100)
            await anext(events)
            for _ in range(num_signals):
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(0.05)
            finished = [event async for event in events][-1]
            assert isinstance(finished, Finished)
            results.append(finished.reason)

    def on_ready(port: int) -> None:
        thread = threading.Thread(target=lambda: asyncio.run(client(port)))
        client_thread.append(thread)
        thread.start()

    run_server(
        lambda: served_model(engine), ServerOptions(port=0, grace_seconds=20), on_ready=on_ready
    )
    client_thread[0].join(timeout=HANG_SECONDS)
    assert results == [{1: "length", 2: "abort"}[num_signals]]
    assert engine.stats.num_free_pages == NUM_PAGES
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_reading_clients_are_not_cut_while_the_server_closes() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.002)
        async with running_server(engine) as (target, stop), AsyncClient(target) as client:
            calls = [asyncio.create_task(client.complete([i], max_tokens=200)) for i in range(8)]
            await until(lambda: engine.stats.num_prompt_tokens == len(calls))
            stop.set()
            for answer in await asyncio.gather(*calls):
                assert len(answer.token_ids) == 200

    run(test())


def test_the_wire_names_are_stable() -> None:
    service = pb.DESCRIPTOR.services_by_name["Inference"]
    assert service.full_name == "jaxinfer.v1.Inference"
    methods = {method.name: method.server_streaming for method in service.methods}
    assert methods == {
        "Generate": True,
        "Tokenize": False,
        "Detokenize": False,
        "GetModelInfo": False,
        "GetLoad": False,
        "Abort": False,
    }


def test_an_answer_that_fails_since_its_client_left_is_no_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def ending(error: Exception) -> None:
        raise error

    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with running_server(FakeEngine()):
            # As gRPC does: the error of a call's task is never fetched.
            for error in (grpc.aio.InternalError("the client left"), RuntimeError("another")):
                task = asyncio.create_task(ending(error))
                await asyncio.wait((task,))
                del task
            gc.collect()
        assert loop.get_exception_handler() is None

    run(test())
    assert "the client left" not in caplog.text
    assert "another" in caplog.text


def test_a_write_that_fails_since_the_client_left_cancels_the_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def method(self: Any, request: Any, context: Any) -> None:
        raise grpc.aio.InternalError("the client left")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(_checked_call(method)(None, pb.GetLoadRequest(), cast(Any, None)))
    assert caplog.text == ""


@pytest.mark.parametrize("method", ["Tokenize", "Detokenize", "GetLoad"])
def test_clients_that_leave_during_an_answer_leave_no_line_in_the_log(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    requests = {
        "Tokenize": pb.TokenizeRequest(text="x" * 100_000),
        "Detokenize": pb.DetokenizeRequest(token_ids=[65] * 100_000),
        "GetLoad": pb.GetLoadRequest(),
    }
    data = requests[method].SerializeToString()

    async def test() -> None:
        async with running_server(FakeEngine()) as (target, _):
            for i in range(8):
                async with grpc.aio.insecure_channel(target) as channel:
                    answer = channel.unary_unary(f"/jaxinfer.v1.Inference/{method}")
                    calls = [answer(data) for _ in range(8)]
                    await asyncio.sleep(0.004 * i)
                    for call in calls[::2]:
                        call.cancel()
            async with AsyncClient(target) as client:
                assert (await client.load()).accepting
            gc.collect()

    run(test())
    assert caplog.text == ""
