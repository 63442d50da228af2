"""Requests, the declaration of sampling options, and the one table of limits. Host only."""

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cached_property
from typing import Annotated, Literal, get_args, get_origin


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


@dataclass(frozen=True)
class DeclaredOption:
    """Facts about a sampling option that is one number, declared on its field of SamplingParams.

    ``neutral`` says which value leaves sampling alone, ``example`` is one that does not.
    ``model_default``: whether a model may come with a default of its own, and whether that counts
    only where the model asks to be sampled.
    """

    limit: Limit
    neutral: str
    example: float
    model_default: Literal["never", "sampled", "always"] = "never"


@dataclass(frozen=True, kw_only=True)
class SamplingOption(DeclaredOption):
    """A declared option with its name, type and default: the form in which others read it."""

    name: str
    kind: type[int] | type[float]
    default: float

    @property
    def has_model_default(self) -> bool:
        """True where a model may come with a default of its own."""
        return self.model_default != "never"


@dataclass(frozen=True)
class SamplingParams:
    """Choice of the next token. Temperature 0 is greedy: the arg max, seed not used.

    In this order, each over what the one before left (l: logits; c: how often a token stands in the
    output so far):

    - ``repetition_penalty`` r, tokens of prompt or output: l / r where l > 0, else l * r
      (Keskar et al. 2019);
    - ``presence_penalty`` and ``frequency_penalty``: l - presence [c > 0] - frequency c;
    - ``logit_bias``, pairs of token id and what is added to its l, no id twice;
    - ``temperature`` divides l; 0 and what float32 takes for it (below 1.2e-38) is greedy;
    - ``top_k`` keeps the k most probable tokens (0: all), ``top_p`` the most probable ones whose
      probabilities sum to p, ``min_p`` those at least min_p times as probable as the most probable
      one. Tokens tied with the last survivor are kept.

    An option that is one number is declared here and listed in ``SAMPLING_OPTIONS``, from which
    limits, columns of the batch, fields of messages, flags and keys of files are derived.
    """

    temperature: Annotated[
        float, DeclaredOption(Limit(0.0, 100.0), "0 is greedy", 1.0, model_default="sampled")
    ] = 0.0
    top_k: Annotated[
        int, DeclaredOption(Limit(0, 1 << 20), "0 is off", 50, model_default="sampled")
    ] = 0
    top_p: Annotated[
        float, DeclaredOption(Limit(0.0, 1.0, above=True), "1 is off", 0.9, model_default="sampled")
    ] = 1.0
    min_p: Annotated[
        float, DeclaredOption(Limit(0.0, 1.0), "0 is off", 0.01, model_default="sampled")
    ] = 0.0
    repetition_penalty: Annotated[
        float, DeclaredOption(Limit(0.001, 100.0), "1 is off", 1.1, model_default="always")
    ] = 1.0
    presence_penalty: Annotated[float, DeclaredOption(Limit(-2.0, 2.0), "0 is off", 0.1)] = 0.0
    frequency_penalty: Annotated[float, DeclaredOption(Limit(-2.0, 2.0), "0 is off", 0.1)] = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (*(option.name for option in SAMPLING_OPTIONS), "seed"):
            LIMITS[name].check(name, getattr(self, name))
        for name in (*(option.name for option in SAMPLING_OPTIONS if option.kind is int), "seed"):
            _check_whole(name, getattr(self, name))
        LIMITS["num_logit_bias"].check("number of logit_bias", len(self.logit_bias))
        for token_id, bias in self.logit_bias:
            _check_whole("token id of logit_bias", token_id)
            LIMITS["logit_bias"].check(f"logit_bias of token {token_id}", bias)
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise ValueError("logit_bias names a token id twice")

    @property
    def has_penalty(self) -> bool:
        """Tells if the tokens so far change what comes."""
        penalties = self.presence_penalty, self.frequency_penalty
        return self.repetition_penalty != 1 or penalties != (0, 0)


@dataclass(frozen=True)
class Ending:
    """Defaults for the end of a text: stop strings, and new tokens before which there is none."""

    stop: tuple[str, ...] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        LIMITS["num_stop"].check("number of stop", len(self.stop))
        for i, stop in enumerate(self.stop):
            LIMITS["stop_characters"].check(f"characters of stop[{i}]", len(stop))
        LIMITS["min_tokens"].check("min_tokens", self.min_tokens)


def _declared_options() -> tuple[SamplingOption, ...]:
    options = []
    for declared in fields(SamplingParams):
        if get_origin(declared.type) is Annotated:
            kind, facts = get_args(declared.type)
            default = getattr(SamplingParams, declared.name)
            options.append(
                SamplingOption(name=declared.name, kind=kind, default=default, **vars(facts))
            )
    return tuple(options)


SAMPLING_OPTIONS = _declared_options()

LIMITS: dict[str, Limit] = {
    **{option.name: option.limit for option in SAMPLING_OPTIONS},
    "logit_bias": Limit(-100.0, 100.0),
    "num_logit_bias": Limit(0, 300),
    "seed": Limit(0, (1 << 64) - 1),
    "max_tokens": Limit(1, 1 << 20),
    "min_tokens": Limit(0, 1 << 20),
    "num_ending_token_ids": Limit(0, 32),
    "num_stop": Limit(0, 16),
    "stop_characters": Limit(1, 256),
    "n": Limit(1, 16),
    "logprobs": Limit(0, 20),
    "prompt_logprobs": Limit(0, 20),
    "priority": Limit(-100, 100),
    "cache_salt_characters": Limit(0, 128),
    # Bounds on raw input, before anything is tokenized or allocated.
    "prompt_characters": Limit(0, 4 << 20),
    "messages": Limit(1, 1024),
    "request_id_characters": Limit(1, 128),
    "role_characters": Limit(1, 64),
    "num_token_ids": Limit(0, 1 << 20),
}


@dataclass(frozen=True)
class Request:
    """One prompt to continue, ``n`` times: choice i draws with ``sampling.seed`` and i.

    At most ``max_tokens`` new tokens a choice; fewer when one of ``eos_token_ids`` (unless
    ``ignore_eos``) or ``stop_token_ids`` comes, none of which is chosen before ``min_tokens`` new
    tokens. ``logprobs`` k asks for the log-probability of every new token and of the k most
    probable ones, ``prompt_logprobs`` for the same of prompt tokens; None is not at all.
    ``priority``: higher runs first. Prompts share cached prefixes only within one ``cache_salt``.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        numbers = ["max_tokens", "min_tokens", "n", "priority"]
        numbers += [n for n in ("logprobs", "prompt_logprobs") if getattr(self, n) is not None]
        for name in numbers:
            LIMITS[name].check(name, getattr(self, name))
            _check_whole(name, getattr(self, name))
        if not self.prompt_token_ids:
            raise ValueError("the prompt has no tokens; at least 1 is needed")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})"
            )
        LIMITS["num_ending_token_ids"].check(
            "number of end-of-sequence and stop_token_ids", len(self.ending_token_ids)
        )
        LIMITS["cache_salt_characters"].check("characters of cache_salt", len(self.cache_salt))

    @cached_property
    def ending_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a choice."""
        eos = () if self.ignore_eos else self.eos_token_ids
        return tuple(dict.fromkeys((*eos, *self.stop_token_ids)))

    def check_length(self, max_model_len: int) -> None:
        """Raises ``ValueError`` when prompt and output could exceed ``max_model_len`` tokens."""
        total = len(self.prompt_token_ids) + self.max_tokens
        if total > max_model_len:
            raise ValueError(
                f"prompt ({len(self.prompt_token_ids)} tokens) plus max_tokens "
                f"({self.max_tokens}) is {total}, more than max_model_len ({max_model_len})"
            )

    def check_fits(self, num_tokens: int, max_model_len: int) -> None:
        """Raises ``ValueError`` when this model cannot serve this request."""
        self.check_length(max_model_len)
        biased = [token_id for token_id, _ in self.sampling.logit_bias]
        for name, token_ids in (
            ("prompt token ids", self.prompt_token_ids),
            ("stop_token_ids", self.stop_token_ids),
            ("token ids of logit_bias", biased),
        ):
            low, high = min(token_ids, default=0), max(token_ids, default=0)
            if low < 0 or high >= num_tokens:
                raise ValueError(
                    f"{name} must be in [0, {num_tokens - 1}], got {low if low < 0 else high}"
                )


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


class FinishReason(Enum):
    """Reasons for which a choice ended."""

    STOP = "stop"  # an end-of-sequence or stop token, or a stop string
    LENGTH = "length"  # max_tokens reached
    ABORT = "abort"  # cancelled by the client or by shutdown
