"""Options of ``bench.py serve``: which requests, when, and what is done with the figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.request import LIMITS
from serving.client import DEFAULT_TARGET

MAX_REQUESTS = 100_000
MAX_TOKENS = 1 << 20
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Options:
    """A run's requests, their rates a second, and where its figures go.

    ``num_prompts``: None for a hundred, or for all of ``prompts``, a file of JSON lines. Lengths in
    tokens, uniform within ``random_range_ratio`` of them. ``goodput``: names of ``GOODPUT_METRICS``
    with milliseconds. Raises ``ValueError`` naming the flag of what is out of range.
    """

    address: str = DEFAULT_TARGET
    num_prompts: int | None = None
    request_rate: Sequence[float] = (math.inf,)
    burstiness: float = 1.0
    max_concurrency: int | None = None
    prompts: Path | None = None
    random_input_len: int = 128
    random_output_len: int = 64
    random_range_ratio: float = 0.0
    seed: int = 0
    temperature: float = 0.0
    percentiles: Sequence[float] = (99.0,)
    goodput: Sequence[tuple[str, float]] = ()
    timeout_seconds: float = 3600.0
    output: Path | None = None
    plot: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        whole = {
            "num_prompts": MAX_REQUESTS,
            "max_concurrency": MAX_REQUESTS,
            "random_input_len": MAX_TOKENS,
            "random_output_len": MAX_TOKENS,
        }
        for name, most in whole.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be between 1 and {most}, got {value}"
                )
        if not all(0.001 <= rate <= 1e6 or rate == math.inf for rate in self.request_rate):
            raise ValueError(
                f"--request-rate must be between 0.001 and 1000000, or inf, got {self.request_rate}"
            )
        if not 0.001 <= self.burstiness <= 1e6:
            raise ValueError(
                f"--burstiness must be between 0.001 and 1000000, got {self.burstiness}"
            )
        if not 0 <= self.random_range_ratio < 1:
            raise ValueError(
                f"--random-range-ratio must be in [0, 1), got {self.random_range_ratio}"
            )
        if not all(0 < p <= 100 for p in self.percentiles):
            raise ValueError(f"--percentiles must be in (0, 100], got {self.percentiles}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"--seed must be between 0 and {(1 << 32) - 1}, got {self.seed}")
        if not 1 <= self.timeout_seconds <= 86400:
            raise ValueError(
                f"--timeout-seconds must be between 1 and 86400, got {self.timeout_seconds}"
            )
        LIMITS["temperature"].check("--temperature", self.temperature)
