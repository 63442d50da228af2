"""scripts/bench.py serve: arrivals, arithmetic by hand, and runs against a real server."""

import asyncio
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinfer_entrypoints import bench
from jaxinfer_entrypoints.benchmarks.serve.arrivals import arrival_times, random_lengths
from jaxinfer_entrypoints.benchmarks.serve.metrics import (
    RequestRecord,
    first_errors,
    summarize,
    tokens_per_second,
)
from jaxinfer_entrypoints.benchmarks.serve.plots import whole_seconds
from tests.patience import HANG_SECONDS
from tests.serving.fakes import FakeEngine
from tests.serving.running import run, running_server, until

ROOT = Path(__file__).parents[3]


def serve_figures(capsys: pytest.CaptureFixture[str], engine: FakeEngine, *flags: str) -> Any:
    """The figures of ``bench.py serve --json`` against a server around ``engine``; none failed."""
    figures, error = serve_result(capsys, engine, *flags)
    if error:
        raise SystemExit(error)
    return figures


def serve_result(
    capsys: pytest.CaptureFixture[str], engine: FakeEngine, *flags: str
) -> tuple[Any, str]:
    """The figures, None where it printed none, and what it died of."""

    async def test() -> str:
        async with running_server(engine) as (target, _):
            flags_of_all = ["--address", target, "--json", "--quiet"]
            return await asyncio.to_thread(error_of, *flags_of_all, *flags)

    error = run(test())
    printed = capsys.readouterr().out
    return json.loads(printed) if printed else None, error


def bench_serve(*flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bench.py", "serve", *flags])
        bench.main()


def error_of(*flags: str) -> str:
    """Runs it; what it died of. SystemExit in a task would end the event loop."""
    try:
        bench_serve(*flags)
    except SystemExit as exit_:
        return str(exit_.code)
    return ""


def gaps(burstiness: float) -> np.ndarray:
    times = arrival_times(20_000, 10.0, burstiness, np.random.default_rng(0))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000.0)  # the rate is exactly what was asked for
    return np.diff(times)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_of_a_gamma_distribution(burstiness: float) -> None:
    values = gaps(burstiness)
    assert values.mean() == pytest.approx(0.1, rel=0.01)
    assert values.std() / values.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_poisson_gaps_have_no_memory() -> None:
    values = gaps(1.0)
    for seconds in (0.05, 0.1, 0.3):
        assert (values > seconds).mean() == pytest.approx(math.exp(-10 * seconds), abs=0.01)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, np.random.default_rng(0)) == [0.0, 0.0, 0.0]


def test_lengths_are_within_the_ratio() -> None:
    lengths = random_lengths(1000, 10, 0.25, np.random.default_rng(0))
    assert set(lengths) == set(range(7, 14))  # floor(7.5) to ceil(12.5)
    assert set(random_lengths(9, 10, 0.0, np.random.default_rng(0))) == {10}
    assert min(random_lengths(1000, 1, 0.9, np.random.default_rng(0))) == 1


def record(start: float, *events: tuple[float, int], **values: Any) -> RequestRecord:
    end = events[-1][0] if events else start
    return RequestRecord(start, start, start, end, list(events), **values)


def test_figures_by_hand() -> None:
    records = [
        # ttft 100 ms; 5 tokens in 3 events; tpot (500 - 100) / 4 = 100 ms; gaps 100 and 300 ms
        record(0.0, (0.1, 1), (0.2, 2), (0.5, 2), num_prompt_tokens=7, num_cached_tokens=4),
        # ttft 300 ms, one token: no tpot, no gap
        record(
            1.0,
            (1.3, 1),
            num_prompt_tokens=3,
            num_preemptions=2,
            num_drafted_tokens=8,
            num_accepted_tokens=6,
        ),
        record(1.0, (1.1, 9), error="UNAVAILABLE: gone"),
    ]
    figures = summarize(records, 2.0, (50, 99.5), {"ttft": 200.0, "tpot": 100.5})
    wanted = {
        "duration": 2.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 10,
        "total_output_tokens": 6,
        "request_throughput": 1.0,
        "request_goodput": 0.5,
        "output_throughput": 3.0,
        "total_token_throughput": 8.0,
        "max_output_tokens_per_s": 5.0,
        "max_concurrent_requests": 1,
        "mean_ttft_ms": 200.0,
        "median_ttft_ms": 200.0,
        "std_ttft_ms": 100.0,
        "p50_ttft_ms": 200.0,
        "p99.5_ttft_ms": 299.0,
        "mean_tpot_ms": 100.0,
        "std_tpot_ms": 0.0,
        "mean_itl_ms": 200.0,
        "median_itl_ms": 200.0,
        "p50_itl_ms": 200.0,
        "mean_e2el_ms": 400.0,
        "total_cached_tokens": 4,
        "num_preemptions": 2,
        "num_drafted_tokens": 8,
        "num_accepted_tokens": 6,
        "acceptance_rate": 0.75,
        "tokens_per_event": 1.5,
        "errors": ["1 x UNAVAILABLE: gone"],
    }
    for name, value in wanted.items():
        assert figures[name] == pytest.approx(value), name
    assert tokens_per_second(records[:2]).tolist() == [5.0, 1.0]


def test_the_plot_leaves_out_the_last_part_of_a_second() -> None:
    assert whole_seconds(np.array([5, 7, 1]), 2.4).tolist() == [5, 7]
    assert whole_seconds(np.array([5, 7]), 2.0).tolist() == [5, 7]
    assert whole_seconds(np.array([5]), 0.25).tolist() == [20]
    # Seconds in which nothing came are seconds of the run.
    assert whole_seconds(np.array([5, 7]), 4.9).tolist() == [5, 7, 0, 0]
    assert whole_seconds(np.zeros(0), 1.5).tolist() == [0]


def test_latency_counts_from_the_start_and_not_from_sending() -> None:
    late = RequestRecord(arrival=1.0, start=1.0, sent=1.25, end=2.0, events=[(1.5, 1), (2.0, 1)])
    figures = summarize([late], 2.0)
    assert figures["mean_ttft_ms"] == 500
    assert figures["mean_e2el_ms"] == 1000
    assert figures["max_send_delay_ms"] == 250


def test_no_latencies_of_nothing() -> None:
    figures = summarize([record(0.0, error="no")], 1.0)
    assert figures["failed"] == 1
    assert figures["mean_ttft_ms"] is figures["p99_itl_ms"] is figures["request_goodput"] is None
    assert json.dumps(figures)


def test_errors_are_counted_by_kind_and_none_is_dropped() -> None:
    records = [record(0.0, error=f"kind {i % 7}") for i in range(70)]
    errors = first_errors(records)
    assert errors == [*(f"10 x kind {i}" for i in range(5)), "and 2 other kinds of errors"]


def test_a_run_has_exactly_the_lengths_that_were_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = ["--num-prompts", "12", "--random-input-len", "20", "--random-output-len", "6"]
    output, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    files = ["--output", str(output), "--plot", str(plot), "--goodput", "ttft:60000", "tpot:60000"]
    engine = FakeEngine(eos_after=2, num_cached_tokens=4)
    figures = serve_figures(capsys, engine, *sizes, *files)
    assert figures["completed"] == figures["num_prompts"] == 12
    assert figures["failed"] == 0
    assert figures["errors"] == []
    assert figures["total_input_tokens"] == 12 * 20
    assert figures["total_output_tokens"] == 12 * 6
    assert figures["total_cached_tokens"] == 12 * 4
    assert figures["request_goodput"] == figures["request_throughput"] > 0
    assert figures["request_rate"] == "inf"
    assert figures["model_id"] == "fake"
    assert figures["server"]["max_model_len"] == 512
    assert 0 < figures["median_ttft_ms"] <= figures["p99_ttft_ms"] <= figures["p99_e2el_ms"]
    assert figures["duration"] * figures["output_throughput"] == pytest.approx(72, rel=0.01)
    assert json.loads(output.read_text()) == figures
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {request.cache_salt for request in engine.requests} != {""}


def test_a_slow_server_does_not_slow_the_arrivals(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(step_seconds=0.04)
    flags = ["--num-prompts", "8", "--request-rate", "100", "--random-output-len", "12"]
    figures = serve_figures(capsys, engine, *flags)
    assert engine.max_running == 8  # all came within 80 ms, none was finished before 480
    assert figures["max_concurrent_requests"] == 8
    assert figures["duration"] > 12 * 0.04


def test_interrupted_it_keeps_what_was_answered(tmp_path: Path) -> None:
    """Ctrl-C after the first answers: they are counted and written, and the status tells."""
    output = tmp_path / "figures.json"
    flags = ["--num-prompts", "50", "--request-rate", "10", "--random-output-len", "2"]

    async def test() -> tuple[int, str]:
        engine = FakeEngine(step_seconds=0.01)
        async with running_server(engine) as (target, _):
            command = [sys.executable, "scripts/bench.py", "serve", "--address", target, "--quiet"]
            process = await asyncio.create_subprocess_exec(
                *command,
                *flags,
                *("--output", str(output)),
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            await until(lambda: len(engine.requests) > 3)
            process.send_signal(signal.SIGINT)
            _, errors = await process.communicate()
            assert process.returncode is not None
            return process.returncode, errors.decode()

    status, errors = run(test())
    figures = json.loads(output.read_text())
    assert status == 130
    assert figures["interrupted"]
    assert 1 <= figures["completed"] < 50
    assert errors == f"interrupted after {figures['completed']} of 50 requests\n"
    assert figures["total_output_tokens"] == 2 * figures["completed"]


def test_max_concurrency_holds_requests_back(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(step_seconds=0.01)
    flags = ["--num-prompts", "8", "--max-concurrency", "2", "--random-output-len", "5"]
    figures = serve_figures(capsys, engine, *flags)
    assert engine.max_running == 2
    assert figures["completed"] == 8
    assert figures["max_concurrent_requests"] == 2
    # Latency counts from when a request was let go: the last of four turns waited for no other.
    assert figures["mean_e2el_ms"] < 1e3 * figures["duration"] / 2


def test_several_tokens_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-prompts", "3", "--random-output-len", "8"]
    figures = serve_figures(capsys, FakeEngine(num_tokens=4, step_seconds=0.02), *flags)
    assert figures["tokens_per_event"] == 4
    # 7 tokens after the first in one gap.
    assert figures["mean_itl_ms"] == pytest.approx(7 * figures["mean_tpot_ms"], rel=0.3)


def test_several_rates_are_one_point_each(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine, plot = FakeEngine(), tmp_path / "plot.png"
    flags = ["--num-prompts", "5", "--request-rate", "50", "inf", "--plot", str(plot)]
    figures = serve_figures(capsys, engine, *flags, "--random-output-len", "4")
    assert [point["request_rate"] for point in figures["points"]] == [50.0, "inf"]
    assert [point["completed"] for point in figures["points"]] == [5, 5]
    assert plot.read_bytes().startswith(b"\x89PNG")
    # The same prompts, but no run finds another's pages.
    prompts = [request.prompt_token_ids for request in engine.requests]
    assert sorted(prompts[:5]) == sorted(prompts[5:])
    assert len({request.cache_salt for request in engine.requests}) == 2


def test_prompts_of_a_file_and_those_that_fail(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "abc"},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"token_ids": [1, 2, 3]},
        {"token_ids": [255]},  # this engine refuses it
        {"token_ids": [-1]},  # no message can hold it
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "figures.json"
    flags = ["--prompts", str(path), "--random-output-len", "3"]
    figures, error = serve_result(capsys, FakeEngine(), *flags, "--output", str(output))
    assert (figures["num_prompts"], figures["completed"], figures["failed"]) == (5, 3, 2)
    assert json.loads(output.read_text()) == figures
    assert len(figures["errors"]) == 2
    # The exit status is 1: a script that measures must not miss it.
    assert error.startswith("error: 2 of 5 requests failed, the first of them: 1 x ")
    assert error.removeprefix("error: 2 of 5 requests failed, the first of them: ") in str(figures)
    several = ["--request-rate", "200", "inf"]
    _, error = serve_result(capsys, FakeEngine(), *flags, *several)
    assert error.startswith("error: 4 of 10 requests failed, the first of them: 1 x ")
    assert any("starts with 255" in error for error in figures["errors"])
    with pytest.raises(SystemExit, match=r"--num-prompts 6 is more than the 5 lines of"):
        serve_figures(capsys, FakeEngine(), *flags, "--num-prompts", "6")


def test_when_all_fail_the_first_error_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"token_ids": [255]}\n' * 4)
    with pytest.raises(SystemExit, match=r"all requests failed: 4 x .* starts with 255"):
        serve_figures(capsys, FakeEngine(), "--prompts", str(path))


def test_an_answer_that_is_too_short_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    # The server stops while two requests are on their way.
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.02)
        async with running_server(engine, grace_seconds=0.0) as (target, stop):
            flags = ["--address", target, "--quiet", "--num-prompts", "2"]
            task = asyncio.create_task(asyncio.to_thread(error_of, *flags))
            await until(lambda: engine.num_steps > 3)
            stop.set()
            assert "all requests failed: 2 x ended (abort) before the tokens" in await task

    run(test())


def test_table_of_one_run_and_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with running_server(FakeEngine()) as (target, _):
            flags = ["--address", target, "--quiet", "--num-prompts", "3"]
            assert not await asyncio.to_thread(error_of, *flags, "--percentiles", "50", "99.9")
            assert not await asyncio.to_thread(error_of, *flags, "--request-rate", "99", "200")

    run(test())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fake at 127.0.0.1:")
    assert any(line.split() == ["ms", "mean", "median", "std", "p50", "p99.9"] for line in lines)
    assert lines[-3].split()[-1] == "p99_tpot_ms"
    assert [line.split()[:3] for line in lines[-2:]] == [["99.00", "3", "0"], ["200.00", "3", "0"]]


def test_no_server_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^error: no server is ready at 127\.0\.0\.1:1: .*$"):
        bench_serve("--address", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--address", "http://a:1"],
            "must be HOST:PORT with a port between 1 and 65535, got 'http",
        ),
        (["--num-prompts", "0"], "--num-prompts must be between 1 and 100000, got 0"),
        (["--request-rate", "0"], r"--request-rate must be between 0.001 and 1000000, or inf"),
        (["--request-rate", "nan"], r"or inf, got [nan]"),
        (["--burstiness", "inf"], "--burstiness must be between 0.001 and 1000000, got inf"),
        (["--random-range-ratio", "1"], "--random-range-ratio must be in [0, 1), got 1.0"),
        (["--percentiles", "101"], "--percentiles must be in (0, 100], got [101.0]"),
        (["--goodput", "itl:5"], "with a name of ttft, tpot, e2el, got 'itl:5'"),
        (["--goodput", "ttft:-5"], "got 'ttft:-5'"),
        (["--temperature", "nan"], "--temperature must be in [0.0, 100.0], got nan"),
        (["--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
    ],
)
def test_limits(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        bench_serve(*flags)
    assert message in capsys.readouterr().err


def test_what_cannot_be_written_or_served_is_said_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"the folder .* does not exist"):
        bench_serve("--output", str(tmp_path / "no" / "figures.json"))
    with pytest.raises(SystemExit, match=r"is a folder, not a file to write"):
        bench_serve("--output", str(tmp_path))
    with pytest.raises(SystemExit, match=r"--plot draws a PNG file, got 'plot\.svg'"):
        bench_serve("--plot", str(tmp_path / "plot.svg"))
    too_long = ["--random-input-len", "500", "--random-output-len", "13"]
    with pytest.raises(SystemExit, match=r"500 tokens .* up to 13 are more than .* \(512\)"):
        serve_figures(capsys, FakeEngine(), *too_long)


def test_needs_no_jax() -> None:
    code = "import sys\nfrom jaxinfer_entrypoints import bench\n"
    code += "import jaxinfer_entrypoints.benchmarks.serve.driver; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=HANG_SECONDS)
