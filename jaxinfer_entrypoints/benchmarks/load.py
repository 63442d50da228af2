"""``bench.py load``: speed and latency against the number of sequences that run at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.batch import BatchShape, padded_decodes
from jaxinfer_entrypoints.benchmarks.measuring import (
    describe,
    latencies,
    measure,
    random_prompts,
    requests_of,
)
from jaxinfer_entrypoints.benchmarks.ranges import check_range
from jaxinfer_entrypoints.loading.assembly import LoadedModel, new_engine


@dataclass(frozen=True)
class Options:
    """Numbers of sequences at once, and sizes in tokens. ``ValueError`` if out of range."""

    concurrency: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    prompt_len: int = 32
    output_len: int = 32
    plot: Path | None = None

    def __post_init__(self) -> None:
        for name in ("concurrency", "prompt_len", "output_len"):
            check_range(name, getattr(self, name), 1, 1024)


def run(loaded: LoadedModel, options: Options) -> dict[str, Any]:
    """One engine, twice as many requests as run at once, for each number."""
    points = []
    for size in options.concurrency:
        rows = padded_decodes(size)
        engine = new_engine(
            loaded,
            [BatchShape(rows, tiles) for tiles in (0, *loaded.spec.config.tile_counts)],
            max_num_seqs=size,
            prefix_cache=False,
        )
        prompts = random_prompts(loaded.spec.model.num_tokens, [options.prompt_len] * 2 * size)
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
