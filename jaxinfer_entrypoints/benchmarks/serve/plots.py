"""Draws what ``bench.py serve`` found. Needs matplotlib, which is imported only then."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer_entrypoints.benchmarks.serve.metrics import RequestRecord, tokens_per_second
from jaxinfer_entrypoints.machine.installing import install_command


def check_plot(path: Path) -> None:
    """Raises ``ValueError`` before anything is measured that could not be drawn."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot draws a PNG file, got {path.name!r:.80}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--plot needs matplotlib: {install_command('plot')}")


def draw_run(figures: dict[str, Any], records: Sequence[RequestRecord], path: Path) -> None:
    """Draws the distributions of times to the first token and between tokens; speed over time."""
    pyplot = _pyplot()
    done = [record for record in records if record.error is None]
    figure, (first, between, speed) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for axes, name, seconds in (
        (first, "time to first token", [record.ttft for record in done]),
        (between, "time between tokens", [gap for record in done for gap in record.itls]),
    ):
        # Cumulative: no bins to choose, percentiles can be read off.
        milliseconds = 1e3 * np.sort(seconds)
        axes.plot(milliseconds, np.arange(1, len(seconds) + 1) / max(1, len(seconds)))
        axes.set_xlabel(f"{name}, ms")
        axes.set_ylabel("share of requests" if axes is first else "share of gaps")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1)
    speed.stairs(whole_seconds(tokens_per_second(done), figures["duration"]))
    speed.set_xlabel("seconds since the start, whole ones only")
    speed.set_ylabel("output tokens/s")
    speed.set_xlim(left=0)
    speed.set_ylim(bottom=0)
    figure.suptitle(f"{_title(figures)}, {figures['request_rate']} requests/s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def whole_seconds(rates: np.ndarray, duration: float) -> np.ndarray:
    """A rate for each whole second of a run: the rest of one at the end would look like a drop.

    A run that is shorter than a second is drawn as one, at its mean rate.
    """
    if duration < 1:
        return np.array([rates.sum() / max(duration, 1e-4)])
    whole = np.zeros(int(duration))
    whole[: len(rates)] = rates[: len(whole)]
    return whole


def draw_rates(figures: dict[str, Any], path: Path) -> None:
    """Latencies, and output tokens a second, against the rate of requests."""
    pyplot = _pyplot()
    points = figures["points"]
    places = range(len(points))
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6))
    last = [key for key in points[0] if key.startswith("p") and key.endswith("_ttft_ms")][-1]
    percentile = last.removesuffix("_ttft_ms")
    for axes, name, meaning in (
        (panels[0], "ttft", "time to first token, ms"),
        (panels[1], "tpot", "time per output token, ms"),
    ):
        for key, style in (("median", "o-"), (percentile, "s--")):
            values = [point[f"{key}_{name}_ms"] for point in points]
            axes.plot(places, [np.nan if v is None else v for v in values], style, label=key)
        axes.set_ylabel(meaning)
        axes.legend()
    panels[2].plot(places, [point["output_throughput"] for point in points], "o-")
    panels[2].set_ylabel("output tokens/s")
    for axes in panels:
        # Evenly spaced, since inf is among the rates.
        axes.set_xticks(places, [str(point["request_rate"]) for point in points])
        axes.set_xlabel("requests/s")
        axes.set_ylim(bottom=0)
    figure.suptitle(_title(figures))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _title(figures: dict[str, Any]) -> str:
    return f"{figures['model_id']}, {figures['server']['weights_dtype']}, {figures['date']}"


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
