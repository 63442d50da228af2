"""What a client may ask for, and the one table of limits it is checked against. Host only."""

import math
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True)
class Limit:
    """A closed range of allowed values; ``above`` excludes the lower end."""

    low: float
    high: float
    above: bool = False

    def check(self, name: str, value: float) -> None:
        """Raises ``ValueError`` naming the value and the limit."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, got {value!r}")
        inside = self.low < value if self.above else self.low <= value
        if math.isnan(value) or not inside or value > self.high:
            bracket = "(" if self.above else "["
            raise ValueError(f"{name} must be in {bracket}{self.low}, {self.high}], got {value}")


LIMITS: dict[str, Limit] = {
    "temperature": Limit(0.0, 100.0),
    "top_k": Limit(0, 1 << 20),
    "top_p": Limit(0.0, 1.0, above=True),
    "seed": Limit(0, (1 << 64) - 1),
    "max_tokens": Limit(1, 1 << 20),
    # Bounds on raw input, before anything is tokenized or allocated.
    "prompt_characters": Limit(0, 4 << 20),
    "messages": Limit(1, 1024),
    "request_id_characters": Limit(1, 128),
    "role_characters": Limit(1, 64),
    "num_token_ids": Limit(0, 1 << 20),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy: the arg max, seed not used.

    ``top_k`` 0 and ``top_p`` 1 switch the filters off. Filters apply in the order temperature,
    top_k, top_p, each over what the one before left, tokens tied with the last survivor kept.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "seed"):
            LIMITS[name].check(name, getattr(self, name))
        for name in ("top_k", "seed"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Request:
    """One prompt to continue. ``max_tokens`` new tokens at most, fewer at an end-of-sequence token.

    ``eos_token_ids`` end the text and are not part of it; ``ignore_eos`` generates through them.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        LIMITS["max_tokens"].check("max_tokens", self.max_tokens)
        if not self.prompt_token_ids:
            raise ValueError("the prompt has no tokens; at least 1 is needed")

    def check_length(self, max_model_len: int) -> None:
        """Raises ``ValueError`` when prompt and output could exceed ``max_model_len`` tokens."""
        total = len(self.prompt_token_ids) + self.max_tokens
        if total > max_model_len:
            raise ValueError(
                f"prompt ({len(self.prompt_token_ids)} tokens) plus max_tokens "
                f"({self.max_tokens}) is {total}, more than max_model_len ({max_model_len})"
            )

    def check_fits(self, vocab_size: int, max_model_len: int) -> None:
        """Raises ``ValueError`` when this model cannot serve this request."""
        self.check_length(max_model_len)
        low, high = min(self.prompt_token_ids), max(self.prompt_token_ids)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"prompt token ids must be in [0, {vocab_size - 1}], got {low if low < 0 else high}"
            )


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence token
    LENGTH = "length"  # max_tokens reached
    ABORT = "abort"  # cancelled by the client or by shutdown
