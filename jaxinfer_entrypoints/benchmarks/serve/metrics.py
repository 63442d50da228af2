"""From the times of requests to the figures of a run, named as in vLLM's ``bench serve``.

Knows neither a server nor a clock: times are seconds since the run began.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

MAX_ERRORS = 5
METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "time between events with tokens",
    "e2el": "whole request",
}


@dataclass
class RequestRecord:
    """One request's times, and what became of it.

    ``arrival``: when it was meant to be sent; ``start``: where its latency counts from, the
    arrival, or where ``--max-concurrency`` held it back the moment that it was let go; ``sent``:
    when it was sent. ``events``: time and number of tokens of each event that brought tokens.
    ``error`` is None for one that completed.
    """

    arrival: float
    start: float = 0.0
    sent: float = 0.0
    end: float = 0.0
    events: list[tuple[float, int]] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    error: str | None = None

    @property
    def num_output_tokens(self) -> int:
        return sum(count for _, count in self.events)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.events[0][0] - self.start

    @property
    def e2el(self) -> float:
        """Seconds to the last event."""
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first, (e2el - ttft) / (tokens - 1); None for one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.num_output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Seconds between events that brought tokens.

        Tokens that came in one event came at once, and count as one gap, as in vLLM: with several
        tokens an event these are longer than ``tpot`` and fewer than the tokens.
        """
        times = [time for time, _ in self.events]
        return [later - earlier for earlier, later in pairwise(times)]


def summarize(
    records: Sequence[RequestRecord],
    duration: float,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Throughputs and latencies of the completed requests; the failed ones are counted and named.

    Throughputs are over ``duration`` seconds. ``goodput``: the most milliseconds of ttft, tpot or
    e2el that a good request may take; one with a single token has a tpot of 0 there. Latencies
    are milliseconds, None where there are none.
    """
    done = [record for record in records if record.error is None]
    num_input = sum(record.num_prompt_tokens for record in done)
    num_output = sum(record.num_output_tokens for record in done)
    num_events = sum(len(record.events) for record in done)
    figures: dict[str, Any] = {
        "duration": round(duration, 4),
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": round(len(done) / duration, 4),
        "request_goodput": None,
        "output_throughput": round(num_output / duration, 3),
        "total_token_throughput": round((num_input + num_output) / duration, 3),
        "max_output_tokens_per_s": _max_tokens_per_second(done),
        "max_concurrent_requests": _max_concurrent(done),
    }
    if goodput:
        good = sum(_is_good(record, goodput) for record in done)
        figures["request_goodput"] = round(good / duration, 4)
    values = {
        "ttft": [record.ttft for record in done],
        "tpot": [record.tpot for record in done if record.tpot is not None],
        "itl": [gap for record in done for gap in record.itls],
        "e2el": [record.e2el for record in done],
    }
    for name, seconds in values.items():
        figures |= _statistics(name, seconds, percentiles)
    num_drafted = sum(record.num_drafted_tokens for record in done)
    num_accepted = sum(record.num_accepted_tokens for record in done)
    return figures | {
        "num_drafted_tokens": num_drafted,
        "num_accepted_tokens": num_accepted,
        "acceptance_rate": round(num_accepted / num_drafted, 4) if num_drafted else None,
        "total_cached_tokens": sum(record.num_cached_tokens for record in done),
        "num_preemptions": sum(record.num_preemptions for record in done),
        "tokens_per_event": round(num_output / num_events, 3) if num_events else None,
        # How late this client itself was: with a great delay it was the bottleneck.
        "max_send_delay_ms": round(1e3 * max((r.sent - r.start for r in records), default=0), 3),
        "errors": first_errors(records),
    }


def first_errors(records: Iterable[RequestRecord]) -> list[str]:
    """The first kinds of errors, each with how many requests met it."""
    counts = Counter(record.error for record in records if record.error is not None)
    errors = [f"{count} x {error}" for error, count in list(counts.items())[:MAX_ERRORS]]
    more = len(counts) - len(errors)
    return [*errors, f"and {more} other kinds of errors"] if more else errors


def tokens_per_second(records: Sequence[RequestRecord]) -> np.ndarray:
    """Output tokens in each second of the run, all requests together."""
    events = [event for record in records for event in record.events]
    if not events:
        return np.zeros(0)
    return np.bincount([int(time) for time, _ in events], [count for _, count in events])


def _is_good(record: RequestRecord, goodput: Mapping[str, float]) -> bool:
    seconds = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2el}
    return all(1e3 * seconds[name] <= limit for name, limit in goodput.items())


def _statistics(
    name: str, seconds: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float | None]:
    milliseconds = 1e3 * np.asarray(seconds)
    functions = {"mean": np.mean, "median": np.median, "std": np.std}
    found = {key: function(milliseconds) for key, function in functions.items() if len(seconds)}
    names = {f"p{int(p) if p == int(p) else p}": p for p in percentiles}
    found |= {key: np.percentile(milliseconds, p) for key, p in names.items() if len(seconds)}
    keys = [*functions, *names]
    return {
        f"{key}_{name}_ms": round(float(found[key]), 3) if key in found else None for key in keys
    }


def _max_tokens_per_second(records: Sequence[RequestRecord]) -> float:
    return float(max(tokens_per_second(records), default=0.0))


def _max_concurrent(records: Sequence[RequestRecord]) -> int:
    """The most requests that were on their way at once; one that ends makes room first."""
    changes = [(record.sent, 1) for record in records] + [(record.end, -1) for record in records]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most
