"""``bench.py serve``: drives a running server over gRPC and times its answers.

Open loop: each request is sent when it is due, however slow the server is, unless
``--max-concurrency`` holds it back. Latency counts from the moment a request was due, or with
``--max-concurrency`` was let go, to when its events arrive here, so what the client and the network
take is in it. Every run uses a cache salt of its own: no prompt is found in the prefix cache
because of an earlier run. Needs neither JAX nor a model.
"""

import asyncio
import contextlib
import json
import math
import platform
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxinfer_entrypoints.benchmarks.serve.metrics import METRICS, RequestRecord, summarize
from jaxinfer_entrypoints.benchmarks.serve.options import Options
from jaxinfer_entrypoints.benchmarks.serve.plots import check_plot, draw_rates, draw_run
from jaxinfer_entrypoints.benchmarks.serve.requests import (
    Load,
    count_prompts,
    make_load,
    read_prompts,
)
from jaxinfer_entrypoints.inputs.prompt_lines import PromptLine
from serving.client import AsyncClient, Delta, Finished, ServerError, Started
from serving.proto.jaxinfer.v1 import inference_pb2 as pb

GREETING_SECONDS = 30.0


def run(options: Options) -> dict[str, Any]:
    """The figures of one run, or ``points`` where several rates are asked for."""
    for path in filter(None, (options.output, options.plot)):
        if not path.parent.is_dir():  # said now, not after an hour
            raise ValueError(f"{path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a file to write")
    if options.plot:
        check_plot(options.plot)
    lines = read_prompts(options.prompts) if options.prompts else None
    try:
        return asyncio.run(drive(options, lines))
    except ServerError as error:
        raise ValueError(f"the server at {options.address} failed: {error}") from error


async def drive(options: Options, lines: Sequence[PromptLine] | None) -> dict[str, Any]:
    """Runs each rate against the server and writes what is asked for."""
    async with AsyncClient(options.address) as client:
        info = await greet(client, options.address)
        num_prompts = count_prompts(options, lines)
        common = {"num_prompts": num_prompts, **describe(options, info)}
        records, runs = [], []
        for rate in options.request_rate:
            load = make_load(options, lines, num_prompts, rate, info)
            records, duration = await send(client, load, options)
            was_interrupted = len(records) < num_prompts
            if not records:
                if not runs:
                    raise KeyboardInterrupt
                runs[-1]["interrupted"] = True
                break
            figures = summarize(records, duration, options.percentiles, dict(options.goodput))
            if not figures["completed"]:
                error = f"all requests failed: {'; '.join(figures['errors'])}"
                if runs and options.output:  # the rates before took their time
                    write_json(options.output, common | {"points": runs, "error": error})
                raise ValueError(error)
            rate_name = "inf" if rate == math.inf else rate
            runs.append(common | {"request_rate": rate_name} | figures)
            if was_interrupted:
                runs[-1]["interrupted"] = True
                break
    if len(options.request_rate) == 1:
        figures = runs[0]
    else:
        points = [{key: value for key, value in run.items() if key not in common} for run in runs]
        figures = common | {"points": points}
    if options.output:
        write_json(options.output, figures)
    if options.plot and "points" not in figures:
        draw_run(figures, records, options.plot)
    elif options.plot:
        draw_rates(figures, options.plot)
    return figures


def write_json(path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


async def greet(client: AsyncClient, address: str) -> pb.GetModelInfoResponse:
    """Asks what is served; raises ``ValueError`` in one line when nobody answers."""
    try:
        async with asyncio.timeout(GREETING_SECONDS):
            return await client.model_info()
    except TimeoutError:
        raise ValueError(f"no answer from {address} within {GREETING_SECONDS:g} s") from None
    except ServerError as error:
        if error.code != "UNAVAILABLE":
            raise
        message = " ".join(error.message.split())[:200]
        raise ValueError(f"no server is ready at {address}: {message}") from None


async def send(
    client: AsyncClient, load: Load, options: Options
) -> tuple[list[RequestRecord], float]:
    """Sends all requests, each when it is due; returns what became of them, and the seconds.

    After Ctrl-C those that were answered until then; the others are cancelled.
    """
    records = [RequestRecord(arrival=arrival) for arrival in load.arrivals]
    answered: set[int] = set()
    places = asyncio.Semaphore(options.max_concurrency or len(records))
    salt = secrets.token_hex(8)
    disable = True if options.quiet else None
    with tqdm(total=len(records), unit="req", file=sys.stderr, disable=disable) as bar:
        started = time.perf_counter()
        run = Run(client, load, options, salt, started)

        async def send_one(number: int) -> None:
            record = records[number]
            # A request that is due already waits for nothing, so all go out in order.
            if (wait := record.arrival - (time.perf_counter() - started)) > 0:
                await asyncio.sleep(wait)
            must_wait = places.locked()
            async with places:
                now = time.perf_counter() - started
                record.start = now if must_wait else record.arrival
                await request(run, number, record)
            answered.add(number)
            bar.update()

        # Ctrl-C cancels the task that runs this, and with it what it waits for.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*(send_one(number) for number in range(len(records))))
        duration = time.perf_counter() - started
        return [records[number] for number in sorted(answered)], duration


@dataclass(frozen=True)
class Run:
    """One run of a load: its client, ``salt`` of the prefix cache, and when it ``started``."""

    client: AsyncClient
    load: Load
    options: Options
    salt: str
    started: float


async def request(run: Run, number: int, record: RequestRecord) -> None:
    """Sends one request; whatever goes wrong with it stands in its record."""
    load, options, started = run.load, run.options, run.started
    max_tokens, end = load.output_lens[number], None
    prompt = load.prompts[number]
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    record.sent = time.perf_counter() - started
    try:
        async for event in run.client.generate(
            prompt,
            max_tokens=max_tokens,
            ignore_eos=True,
            temperature=options.temperature,
            seed=options.seed + number,
            cache_salt=run.salt,
            timeout=options.timeout_seconds,
        ):
            now = time.perf_counter() - started
            match event:
                case Started():
                    record.num_prompt_tokens = event.num_prompt_tokens
                    record.num_cached_tokens = event.num_cached_tokens
                case Delta() if event.token_ids:
                    record.events.append((now, len(event.token_ids)))
                case Finished():
                    end, usage = event, event.usage
                    record.num_preemptions = usage.num_preemptions
                    record.num_drafted_tokens = usage.num_drafted_tokens
                    record.num_accepted_tokens = usage.num_accepted_tokens
    except (ServerError, ValueError, TypeError, OverflowError) as error:
        # ValueError and its like: a prompt that no message can hold, or an event nobody knows.
        record.error = " ".join(str(error).split())[:300]
    else:
        reason = end.reason if end else "without an end"
        if reason != "length" or record.num_output_tokens != max_tokens:
            record.error = f"ended ({reason}) before the tokens that were asked for"
    record.end = time.perf_counter() - started


def describe(options: Options, info: pb.GetModelInfoResponse) -> dict[str, Any]:
    """Describes what was asked for, of which server, with which client."""
    packages = ("jaxinfer", "grpcio", "numpy")
    served = ("version", "weights_dtype", "activations_dtype", "kv_cache_dtype", "quantization")
    sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_pages", "page_size")
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "jaxinfer",
        "model_id": info.model_name,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "random_input_len": None if options.prompts else options.random_input_len,
        "random_output_len": options.random_output_len,
        "random_range_ratio": options.random_range_ratio,
        "seed": options.seed,
        "temperature": options.temperature,
        "goodput": dict(options.goodput) or None,
        "address": options.address,
        "server": {name: getattr(info, name) for name in (*served, *sizes)},
        "client": {
            "machine": f"{platform.machine()} {platform.system()}",
            "python": platform.python_version(),
            **{name: version_of(name) for name in packages},
        },
    }


def version_of(package: str) -> str | None:
    """A package's version; None where it runs from a folder without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def table(figures: dict[str, Any]) -> str:
    """The figures as text: one run in full, or a line a rate."""
    title = f"{figures['model_id']} at {figures['address']}, {figures['date']}"
    if "points" in figures:
        return "\n".join([title, *rate_lines(figures["points"])])
    single = [
        *("num_prompts", "request_rate", "burstiness", "max_concurrency", "completed", "failed"),
        *("duration", "total_input_tokens", "total_cached_tokens", "total_output_tokens"),
        *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
        *("max_output_tokens_per_s", "max_concurrent_requests", "num_preemptions"),
        *("num_drafted_tokens", "acceptance_rate", "tokens_per_event", "max_send_delay_ms"),
    ]
    lines = [title, *(f"{name:<26}{shown(figures[name]):>12}" for name in single)]
    keys = [key.removesuffix("_ttft_ms") for key in figures if key.endswith("_ttft_ms")]
    lines.append(f"{'ms':<6}" + "".join(f"{key:>12}" for key in keys))
    for name, meaning in METRICS.items():
        values = "".join(f"{shown(figures[f'{key}_{name}_ms']):>12}" for key in keys)
        lines.append(f"{name:<6}{values}  {meaning}")
    return "\n".join([*lines, *(f"error: {error}" for error in figures["errors"])])


def check_figures(figures: dict[str, Any]) -> None:
    """Raises ``ValueError`` where requests failed: a script that measures must not miss it."""
    points = figures.get("points", [figures])
    failed, total = sum(point["failed"] for point in points), figures["num_prompts"] * len(points)
    if points[-1].get("interrupted"):
        done = points[-1]["completed"] + points[-1]["failed"]
        print(f"interrupted after {done} of {figures['num_prompts']} requests", file=sys.stderr)
        raise KeyboardInterrupt
    if failed:
        first = next(point["errors"][0] for point in points if point["errors"])
        raise ValueError(f"{failed} of {total} requests failed, the first of them: {first}")


def rate_lines(points: Sequence[dict[str, Any]]) -> list[str]:
    """A header, a line a point, and their errors."""
    columns = ["request_rate", "completed", "failed", "request_throughput", "request_goodput"]
    columns += ["output_throughput"]
    columns += [key for key in points[0] if re.fullmatch(r"(median|p.*)_(ttft|tpot)_ms", key)]
    lines = [" ".join(columns)]
    lines += [" ".join(f"{shown(p[name]):>{len(name)}}" for name in columns) for p in points]
    for point in points:
        lines += [f"error at {point['request_rate']}/s: {error}" for error in point["errors"]]
    return lines


def shown(value: object) -> str:
    """A figure for a table."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
