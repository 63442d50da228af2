"""The gRPC server: sockets, health, reflection, signals; from listening to drained.

It listens before the model is loaded, so that a port in use is told at once and probes get an
answer; health says NOT_SERVING and calls get UNAVAILABLE until the engine is ready.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer  # "health.aio", as its types name it
from grpc_reflection.v1alpha import reflection

from serving.address import DEFAULT_HOST, DEFAULT_PORT
from serving.message_size import MAX_MESSAGE_BYTES
from serving.proto.jaxinfer.v1 import inference_pb2, inference_pb2_grpc
from serving.replicas import Replicas
from serving.rpc.arrivals import Arrivals
from serving.rpc.reception import ReceptionInterceptor
from serving.rpc.service import InferenceService
from serving.served_model import ServedModel

logger = logging.getLogger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name

MAX_CONCURRENT_CALLS = 4096
MAX_PENDING_CALLS = 1 << 14
# Of health, whose watchers stay, and of reflection.
MAX_OTHER_CALLS = 1024
# For the last events to reach clients once the engine has stopped; then calls are cut.
CLOSE_SECONDS = 2.0

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Two servers on one port would share its connections; the second one must fail instead.
    ("grpc.so_reuseport", 0),
    # Calls that our code has not seen yet. With more of them gRPC ends some as CANCELLED, which
    # nobody did; refused by us, they are told why, and when to come again.
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING_CALLS),
    # Clients and gateways may ping every 10 s, also between calls.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # A client whose machine is gone is noticed, and its pages come back, within 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class LoadInterruptedError(Exception):
    """The server was told to stop while the model was being loaded.

    The loading thread still runs and cannot be stopped: leave the process with ``os._exit``.
    """


@dataclass(frozen=True)
class ServerOptions:
    """A server's address, its patience, and how many requests it takes at once.

    ``port`` 0: any free one. Running requests get ``grace_seconds`` after the first signal. An
    engine that does not come back from a step within ``step_timeout`` seconds ends the server;
    None: it never does. A call's message has ``message_seconds`` to come.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    grace_seconds: float = 30.0
    max_live_requests: int = 512
    step_timeout: float | None = 120.0
    message_seconds: float = 60.0


def run_server(
    load: Callable[[], ServedModel],
    options: ServerOptions | None = None,
    *,
    on_listening: Callable[[int], None] | None = None,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, in the main thread. Arguments and errors as in ``serve``."""
    asyncio.run(
        serve(
            load,
            options,
            on_listening=on_listening,
            on_ready=on_ready,
        )
    )


async def serve(
    load: Callable[[], ServedModel],
    options: ServerOptions | None = None,
    *,
    on_listening: Callable[[int], None] | None = None,
    on_ready: Callable[[int], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Listens, loads the model in a thread, serves it, drains.

    ``load`` returns a model whose engines are compiled. ``on_listening`` and ``on_ready`` get the
    port. SIGTERM or SIGINT drains: running requests get ``grace_seconds``, a second signal ends
    them at once. Where ``stop`` is given, that event is the signal and the process's own signals
    are left alone.

    Raises ``OSError`` when it cannot listen, whatever ``load`` raises, ``LoadInterruptedError``,
    and ``EngineFailedError`` when the engine failed and the process should end: with ``os._exit``
    where it is an ``EngineStuckError``.
    """
    options = options or ServerOptions()
    host, port = options.host, options.port
    _check_can_listen(host, port)
    service = InferenceService()
    health_service = HealthServicer()
    # Not by maximum_concurrent_rpcs: that would count health too, and shut it out.
    reception = ReceptionInterceptor(
        service.check_generate,
        ours=Arrivals(MAX_CONCURRENT_CALLS, options.message_seconds),
        others=Arrivals(MAX_OTHER_CALLS, options.message_seconds),
    )
    server = grpc.aio.server(interceptors=(reception,), options=CHANNEL_OPTIONS)
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection(
        (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    await _set_health(health_service, is_serving=False)
    port = _listen(server, host, port)
    replicas: Replicas | None = None
    with _without_failed_answers(), _stop_events(stop) as (stop, hurry):
        try:
            await server.start()
            if on_listening is not None:
                on_listening(port)
            served = await _load(load, stop)
            replicas = Replicas(
                served.engines,
                max_live_requests=options.max_live_requests,
                step_timeout=options.step_timeout,
            )
            service.attach(served, replicas)
            await _set_health(health_service, is_serving=True)
            if on_ready is not None:
                on_ready(port)
            await _first(stop.wait(), replicas.ended.wait())
        finally:
            try:
                await _set_health(health_service, is_serving=False)
                if replicas is not None:
                    await _drain(replicas, options.grace_seconds, hurry)
            finally:
                await server.stop(CLOSE_SECONDS)
                service.close()


def _check_can_listen(host: str, port: int) -> None:
    """Raises ``OSError``. Asked of the system first: gRPC would log lines of its own."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot listen on port {port} of {host}: {error.strerror}"
            ) from None


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(target)
    except RuntimeError as error:
        raise OSError(f"cannot listen on port {port} of {host}: {error}") from error


async def _set_health(service: HealthServicer, is_serving: bool) -> None:
    status = health_pb2.HealthCheckResponse
    for name in ("", SERVICE_NAME):
        await service.set(name, status.SERVING if is_serving else status.NOT_SERVING)


@contextmanager
def _without_failed_answers() -> Iterator[None]:
    """Keeps answers that failed, since their client had left, out of the log.

    gRPC ends the task of such a call with an error that nobody fetches, a traceback of asyncio's.
    """
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, details: dict[str, Any]) -> None:
        if isinstance(details.get("exception"), grpc.aio.InternalError):
            logger.debug("an answer failed: %s", details["exception"])
        elif before is not None:
            before(loop, details)
        else:
            loop.default_exception_handler(details)

    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        loop.set_exception_handler(before)


@contextmanager
def _stop_events(stop: asyncio.Event | None) -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """The events "stop" and "hurry": set by the first and the second SIGTERM or SIGINT."""
    hurry = asyncio.Event()
    if stop is not None:
        yield stop, hurry
        return
    stop = asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop, hurry
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _load(load: Callable[[], ServedModel], stop: asyncio.Event) -> ServedModel:
    """Runs ``load`` in a daemon thread, which an interrupted process need not wait for."""
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[ServedModel] = loop.create_future()

    def settle(served: ServedModel | None, error: BaseException | None) -> None:
        if loaded.done():
            return
        if served is not None:
            loaded.set_result(served)
        else:
            loaded.set_exception(error or RuntimeError("load returned nothing"))

    def run() -> None:
        served, error = None, None
        try:
            served = load()
        except BaseException as raised:
            # SystemExit with a message too: it is raised again where the process can end.
            error = raised
        try:
            loop.call_soon_threadsafe(settle, served, error)
        except RuntimeError:
            logger.debug("the server stopped while the model was being loaded")

    threading.Thread(target=run, name="load", daemon=True).start()
    await _first(loaded, stop.wait())
    if not loaded.done():
        loaded.cancel()
        raise LoadInterruptedError("stopped while the model was being loaded")
    return loaded.result()


async def _drain(replicas: Replicas, grace_seconds: float, hurry: asyncio.Event) -> None:
    draining = asyncio.ensure_future(replicas.drain(grace_seconds))
    await _first(draining, hurry.wait())
    if not draining.done():
        replicas.abort_all()
    await draining


async def _first(*awaitables: Awaitable[object]) -> None:
    """Waits for the first to be done, whatever comes of it; coroutines are cancelled then."""
    tasks = {asyncio.ensure_future(awaitable) for awaitable in awaitables}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks.difference(awaitables):
            task.cancel()
