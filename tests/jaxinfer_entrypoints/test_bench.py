"""scripts/bench.py: every figure is there and they fit together."""

from pathlib import Path

import pytest

from tests.jaxinfer_entrypoints.conftest import Run


@pytest.mark.thorough("benchmarks")
def test_offline_figures(run: Run) -> None:
    sizes = ["--prompt-len", "70", "--output-len", "6", "--num-prompts", "3", "--json"]
    result = run("bench", "offline", *sizes)
    (figures,) = result.lines
    assert figures["prompt_len"] == 70
    assert figures["max_num_seqs"] == 2
    for name in (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "total_tokens_per_second",
        "ttft_ms_p50",
        "ttft_ms_p99",
        "inter_token_ms_p50",
        "inter_token_ms_p99",
        "peak_host_memory_mib",
        "seconds",
    ):
        assert figures[name] > 0, name
    assert figures["device"] == "cpu"
    assert "jax" in figures["versions"]
    assert figures["ttft_ms_p50"] <= figures["ttft_ms_p99"]
    tokens = 3 * (70 + 6)
    assert abs(figures["total_tokens_per_second"] * figures["seconds"] - tokens) < 0.05 * tokens
    assert figures["total_tokens_per_second"] > figures["output_tokens_per_second"]


@pytest.mark.usefixtures("frees_memory")
def test_one_output_token_has_no_decode_rate(run: Run) -> None:
    sizes = ["--prompt-len", "5", "--output-len", "1", "--num-prompts", "1", "--json"]
    (figures,) = run("bench", "offline", *sizes).lines
    assert figures["decode_tokens_per_second"] is None
    assert figures["inter_token_ms_p50"] is None


@pytest.mark.thorough("benchmarks")
def test_host_times_add_up(run: Run) -> None:
    (figures,) = run("bench", "host", "--num-steps", "8", "--json").lines
    for name in ("synchronous", "asynchronous", "asynchronous, 4 steps a call"):
        times = figures[name]
        parts = ("schedule", "pack", "dispatch", "convert", "update", "detokenize")
        total = sum(times[f"{part}_ms"] for part in parts)
        assert times["host_ms"] == pytest.approx(total, abs=1e-3)
        assert times["step_ms"] > 0


@pytest.mark.thorough("benchmarks")
def test_every_arrangement_gives_the_same_tokens(run: Run) -> None:
    """200 greedy and seeded prompts in 6 arrangements, on a tiny model."""
    sizes = ["--num-prompts", "200", "--output-len", "8", "--max-num-seqs", "8", "--json"]
    sizes += ["--kv-memory", "4MiB", "--page-size", "4", "--no-cost"]
    (figures,) = run("bench", "invariance", *sizes).lines
    arrangements = figures["arrangements"]
    assert len(arrangements) == 8
    for name, row in arrangements.items():
        assert row["equal"] == row["requests"] == 200, name
    assert arrangements["preempted, few pages"]["preemptions"] > 0
    assert arrangements["again, from the prefix cache"]["cached_tokens"] > 200
    assert arrangements["alone, no prefix cache"]["cached_tokens"] == 0
    for name in ("drafts from the text", "drafts of the first layers"):
        row = arrangements[name]
        assert 0 < row["accepted_tokens"] < row["drafted_tokens"], name


@pytest.mark.thorough("benchmarks")
@pytest.mark.usefixtures("frees_memory")
def test_load_has_a_point_for_each_concurrency(run: Run, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    sizes = ["--concurrency", "1", "3", "--prompt-len", "9", "--output-len", "4", "--json"]
    (figures,) = run("bench", "load", *sizes, "--plot", str(plot)).lines
    assert [point["concurrency"] for point in figures["points"]] == [1, 3]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_techniques_are_listed_when_none_matches(run: Run) -> None:
    error = run("bench", "techniques", "--only", "magic", "--quiet").error
    assert "'magic' matches none of: KV cache against recomputation; paging" in error


@pytest.mark.usefixtures("frees_memory")
def test_limits(run: Run) -> None:
    assert run("bench", "offline", "--prompt-len", "0").error == "2"
    assert run("bench").error == "2"
    too_long = run("bench", "offline", "--prompt-len", "100", "--output-len", "64", "--quiet").error
    assert "--prompt-len 100 plus --output-len 64 is more than max_model_len (128)" in too_long
