"""scripts/bench.py: every figure is there and they fit together."""

from tests.scripts.conftest import Run


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


def test_one_output_token_has_no_decode_rate(run: Run) -> None:
    sizes = ["--prompt-len", "5", "--output-len", "1", "--num-prompts", "1", "--json"]
    (figures,) = run("bench", "offline", *sizes).lines
    assert figures["decode_tokens_per_second"] is None
    assert figures["inter_token_ms_p50"] is None


def test_limits(run: Run) -> None:
    assert run("bench", "offline", "--prompt-len", "0").error == "2"
    assert run("bench").error == "2"
    too_long = run("bench", "offline", "--prompt-len", "100", "--output-len", "64", "--quiet").error
    assert "--prompt-len 100 plus --output-len 64 is more than max_model_len (128)" in too_long
