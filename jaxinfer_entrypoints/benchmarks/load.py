"""``bench.py load``: speed and latency against the number of sequences that run at once."""

import argparse
from pathlib import Path
from typing import Any

from jaxinfer.batch import BatchShape
from jaxinfer_entrypoints.benchmarks.measuring import (
    describe,
    latencies,
    measure,
    random_prompts,
    requests_of,
)
from jaxinfer_entrypoints.loading.assembly import LoadedModel, new_engine


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32, 64],
        help="default: 1 to 64 in powers of two",
    )
    parser.add_argument("--prompt-len", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="a PNG file to draw (needs matplotlib)")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses sizes out of range."""
    for name, values in (
        ("--concurrency", options.concurrency),
        ("--prompt-len", [options.prompt_len]),
        ("--output-len", [options.output_len]),
    ):
        if not all(1 <= value <= 1024 for value in values):
            parser.error(f"{name} must be between 1 and 1024, got {values}")


def run(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """One engine, twice as many requests as run at once, for each number."""
    points = []
    for size in options.concurrency:
        rows = -(-size // 8) * 8
        engine = new_engine(
            loaded,
            [BatchShape(rows, tiles) for tiles in (0, *loaded.spec.config.tile_counts)],
            max_num_seqs=size,
            prefix_cache=False,
        )
        prompts = random_prompts(loaded.spec.model.vocab_size, [options.prompt_len] * 2 * size)
        measure(engine, requests_of(prompts[:1], 3))
        measured = measure(engine, requests_of(prompts, options.output_len), f"{size} at once")
        points.append(
            {
                "concurrency": size,
                "output_tokens_per_second": round(measured.num_output_tokens / measured.seconds, 2),
                "decode_tokens_per_second": round(
                    measured.decode_tokens / measured.decode_seconds, 2
                ),
                **latencies(measured),
            }
        )
        del engine
    figures = describe(loaded) | {
        "prompt_len": options.prompt_len,
        "output_len": options.output_len,
        "points": points,
    }
    if options.plot:
        draw(figures, options.plot)
    return figures


def table(figures: dict[str, Any]) -> str:
    """The points as text."""
    columns = ["concurrency", "output_tokens_per_second"]
    columns += [f"inter_token_ms_p{p}" for p in (50, 99)]
    lines = [" ".join(f"{name:>25}" for name in columns)]
    lines += [" ".join(f"{point[name]:>25}" for name in columns) for point in figures["points"]]
    return "\n".join(lines)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Tokens per second and the slowest inter-token times against the number of sequences."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    numbers = [point["concurrency"] for point in figures["points"]]
    figure, speed = pyplot.subplots(figsize=(7, 4))
    latency = speed.twinx()
    speeds = [point["output_tokens_per_second"] for point in figures["points"]]
    slowest = [point["inter_token_ms_p99"] for point in figures["points"]]
    lines = speed.plot(numbers, speeds, "o-", color="tab:blue", label="output tokens/s")
    lines += latency.plot(numbers, slowest, "s--", color="tab:red", label="inter-token ms, p99")
    speed.set_xscale("log", base=2)
    speed.set_xticks(numbers, [str(number) for number in numbers])
    speed.set_xlabel("sequences at once")
    speed.set_ylabel("output tokens/s")
    latency.set_ylabel("ms")
    speed.set_ylim(bottom=0)
    latency.set_ylim(bottom=0)
    speed.legend(handles=lines, loc="upper left")
    speed.set_title(", ".join(figures[name] for name in ("model", "dtype", "device", "date")))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
