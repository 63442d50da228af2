"""Faults that clients bring upon a server: how much memory and time each takes, and who waits.

Starts a server of a tiny model and prints one line a trial: ``python -m tools.soak --help``. What
each must come to is held by tests, with smaller numbers.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from tests.checkpoints.gguf.tiny_gguf import llama_bytes

ROOT = Path(__file__).resolve().parent.parent
INFERENCE = "/jaxinfer.v1.Inference/"
CHANNEL_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
SECONDS = 120.0  # patience with one call
SHORT_CHARACTERS = 2700


@dataclass(frozen=True)
class Sizes:
    """Numbers of the trials; ``rate`` is of calls a second, for ``seconds``."""

    num_large: int = 48
    num_empty: int = 4 << 20
    prompt_characters: int = 4 << 20
    num_long: int = 32
    rate: float = 1600.0
    seconds: float = 10.0
    num_headers: int = 4200


SHORT = Sizes(
    num_large=6,
    num_empty=1 << 18,
    prompt_characters=1 << 20,
    num_long=4,
    rate=200.0,
    seconds=1.0,
    num_headers=400,
)


@dataclass(frozen=True)
class Server:
    """A server that runs: where it listens, and its process."""

    target: str
    pid: int

    def channel(self) -> grpc.aio.Channel:
        """A channel with a connection of its own."""
        options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        return grpc.aio.insecure_channel(self.target, options=options)

    def watch_memory(self) -> Callable[[], dict[str, int]]:
        """Returns a function that tells MiB of the process now and at most since.

        It tells nothing where the system does not.
        """
        process = Path(f"/proc/{self.pid}")
        try:
            (process / "clear_refs").write_text("5", encoding="ascii")  # forgets the peak
            before = _memory_mib(process, "VmRSS")
        except OSError:
            return dict
        return lambda: {"MiB before": before, "MiB at most": _memory_mib(process, "VmHWM")}


def _memory_mib(process: Path, field: str) -> int:
    lines = (process / "status").read_text(encoding="ascii").splitlines()
    return round(next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:")) / 1024)


def generate_request(text: str, max_tokens: int = 3) -> bytes:
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=text, sampling=sampling).SerializeToString()


async def outcome(channel: grpc.aio.Channel, method: str, data: bytes) -> tuple[str, float]:
    """Returns the status of a call, and how many seconds it took."""
    started = time.monotonic()
    stream = channel.unary_stream(INFERENCE + method)(data, timeout=SECONDS)
    try:
        async for _ in stream:
            pass
    except grpc.aio.AioRpcError:
        pass
    return (await stream.code()).name, time.monotonic() - started


def percentile(values: list[float], percent: float) -> float:
    """Returns the value that so many of 100 do not exceed; 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


async def large_at_once(server: Server, method: str, data: bytes, number: int) -> dict[str, Any]:
    """Sends the same large message many times at once, each on a connection of its own."""
    memory, started = server.watch_memory(), time.monotonic()
    channels = [server.channel() for _ in range(number)]
    outcomes = await asyncio.gather(*(outcome(channel, method, data) for channel in channels))
    for channel in channels:
        await channel.close()
    return {
        "codes": dict(Counter(code for code, _ in outcomes)),
        "seconds": round(time.monotonic() - started, 2),
        **memory(),
    }


async def empty_messages(server: Server, sizes: Sizes) -> dict[str, Any]:
    """Sends chats of empty messages."""
    body = b"\x0a\x00" * sizes.num_empty
    length = len(body)
    prefix = b"\x22"
    while length > 127:
        prefix, length = prefix + bytes((length & 127 | 128,)), length >> 7
    return await large_at_once(
        server, "Generate", prefix + bytes((length,)) + body, sizes.num_large
    )


async def long_prompts(server: Server, sizes: Sizes) -> dict[str, Any]:
    """Sends prompts that are too long for the context."""
    data = generate_request("word " * (sizes.prompt_characters // 5))
    return await large_at_once(server, "Generate", data, sizes.num_large)


async def short_behind_long(server: Server, sizes: Sizes) -> dict[str, Any]:
    """Has a short prompt tokenized, alone and behind long ones."""
    request = pb.TokenizeRequest(text="word " * (SHORT_CHARACTERS // 5))
    short = request.SerializeToString()
    request.text = "word " * (sizes.prompt_characters // 5)
    long = request.SerializeToString()
    async with server.channel() as channel:
        _, alone = await outcome(channel, "Tokenize", short)
        channels = [server.channel() for _ in range(sizes.num_long)]
        waiting = asyncio.gather(*(outcome(other, "Tokenize", long) for other in channels))
        behind = list[float]()
        while not waiting.done():
            behind.append((await outcome(channel, "Tokenize", short))[1])
            await asyncio.sleep(0.02)
        for other in channels:
            await other.close()
    return {
        "codes of the long": dict(Counter(code for code, _ in await waiting)),
        "ms alone": round(1000 * alone, 1),
        "ms behind, p50": round(1000 * percentile(behind, 50), 1),
        "ms behind, most": round(1000 * max(behind), 1),
    }


async def overload(server: Server, sizes: Sizes) -> dict[str, Any]:
    """Sends requests at a rate that is far too high."""
    memory = server.watch_memory()
    data, calls = generate_request("abc", 64), list[asyncio.Task[tuple[str, float]]]()
    lags = list[float]()
    started = time.monotonic()
    async with server.channel() as channel:
        while (now := time.monotonic() - started) < sizes.seconds:
            while len(calls) < now * sizes.rate:
                calls.append(asyncio.create_task(outcome(channel, "Generate", data)))
            woken = time.monotonic()
            await asyncio.sleep(0.005)
            lags.append(time.monotonic() - woken - 0.005)
        sent = time.monotonic() - started
        outcomes = await asyncio.gather(*calls)
        drained = time.monotonic() - started - sent
        code, recovery = await outcome(channel, "Generate", data)
    refused = [seconds for code, seconds in outcomes if code == "RESOURCE_EXHAUSTED"]
    return {
        "calls a second": round(len(calls) / sent),
        "codes": dict(Counter(code for code, _ in outcomes)),
        "ms to be refused, p50": round(1000 * percentile(refused, 50), 1),
        "ms to be refused, p99": round(1000 * percentile(refused, 99), 1),
        "of them this client's lag, p50": round(1000 * percentile(lags, 50), 1),
        "p99": round(1000 * percentile(lags, 99), 1),
        "seconds until the last ended": round(drained, 2),
        "afterwards": f"{code} in {1000 * recovery:.0f} ms",
        **memory(),
    }


async def headers_only(server: Server, sizes: Sizes) -> dict[str, Any]:
    """Opens calls that never send their message; asks for health and an answer meanwhile."""
    healths, answers = list[float](), list[float]()
    async with server.channel() as flood, server.channel() as channel:
        calls = [flood.stream_stream(INFERENCE + "Generate")() for _ in range(sizes.num_headers)]
        for _ in range(20):
            await asyncio.sleep(0.05)
            started = time.monotonic()
            stub: Any = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
            healths.append(time.monotonic() - started)
            code, seconds = await outcome(channel, "Generate", generate_request("abc"))
            answers.append(seconds if code == "OK" else SECONDS)
        codes = Counter([(await call.code()).name for call in calls if call.done()])
        for call in calls:
            call.cancel()
    return {
        "codes": dict(codes),
        "still waiting": sizes.num_headers - sum(codes.values()),
        "ms of health, most": round(1000 * max(healths), 1),
        "ms of an answer, most": round(1000 * max(answers), 1),
    }


TRIALS: dict[str, Callable[[Server, Sizes], Coroutine[Any, Any, dict[str, Any]]]] = {
    "empty messages": empty_messages,
    "long prompts": long_prompts,
    "short behind long": short_behind_long,
    "overload": overload,
    "headers only": headers_only,
}


async def soak(server: Server, sizes: Sizes, names: Iterable[str] = TRIALS) -> None:
    """Runs trials, one after the other, and prints their figures."""
    for name in names:
        figures = await TRIALS[name](server, sizes)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))


def with_server(run: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
    """Starts a server of a tiny model for ``run``."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny.gguf"
        model.write_bytes(llama_bytes())
        sizes = ("--max-num-seqs", "2", "--max-num-batched-tokens", "64", "--kv-memory", "1MiB")
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--cpu", "--port", "0"]
        with subprocess.Popen(
            [*command, "--model", str(model), *sizes], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("SERVING"):
                raise SystemExit(f"error: the server did not start: {line!r}")
            try:
                asyncio.run(run(Server(line.split()[-1], process.pid)))
            finally:
                process.terminate()


def main() -> None:
    """Runs all trials against a server of its own."""
    parser = argparse.ArgumentParser(description="Bring faults upon a server of a tiny model.")
    parser.add_argument("--short", action="store_true", help="small numbers, a few seconds")
    parser.add_argument(
        "--only", action="append", choices=TRIALS, metavar="TRIAL", help=", ".join(TRIALS)
    )
    options = parser.parse_args()
    sizes = SHORT if options.short else Sizes()
    with_server(lambda server: soak(server, sizes, options.only or TRIALS))


if __name__ == "__main__":
    main()
