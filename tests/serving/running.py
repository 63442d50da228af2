"""A real server on a free port of the loopback, around a fake engine, for one test."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from jaxinfer.request import Ending, SamplingParams
from serving.client import AsyncClient
from serving.rpc.server import ServerOptions, serve
from tests.patience import HANG_SECONDS
from tests.serving.fakes import NUM_PAGES, FakeEngine, served_model


def run[T](test: Coroutine[None, None, T]) -> T:
    """Runs an asynchronous test, which must end some time."""

    async def bounded() -> T:
        async with asyncio.timeout(HANG_SECONDS):
            return await test

    return asyncio.run(bounded())


@asynccontextmanager
async def running_server(
    *engines: FakeEngine,
    grace_seconds: float = 5.0,
    max_live_requests: int = 64,
    step_timeout: float | None = None,
    message_seconds: float = HANG_SECONDS,
    default_sampling: SamplingParams | None = None,
    default_ending: Ending | None = None,
) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """Yields "host:port" and the event that stops the server; a failed server raises at the end."""
    stop, default = asyncio.Event(), default_sampling or SamplingParams()
    defaults = {"default_sampling": default, "default_ending": default_ending or Ending()}
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(
        serve(
            lambda: replace(served_model(*engines), **defaults),
            ServerOptions(
                port=0,
                grace_seconds=grace_seconds,
                max_live_requests=max_live_requests,
                step_timeout=step_timeout,
                message_seconds=message_seconds,
            ),
            on_ready=ready.set_result,
            stop=stop,
        )
    )
    await asyncio.wait((ready, server), return_when=asyncio.FIRST_COMPLETED)
    if server.done():
        await server
    try:
        yield f"127.0.0.1:{ready.result()}", stop
    finally:
        for engine in engines:
            engine.gate.set()
        stop.set()
        await server


@asynccontextmanager
async def running_client(*engines: FakeEngine, **options: Any) -> AsyncIterator[AsyncClient]:
    """A client of a running server; when the test is over, all pages must have come back."""
    async with running_server(*engines, **options) as (target, _), AsyncClient(target) as client:
        yield client
        await until(lambda: all(e.stats.num_free_pages == NUM_PAGES for e in engines))


async def until(condition: Callable[[], bool], timeout: float = HANG_SECONDS) -> None:
    """Waits for another thread to have done something."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)
