"""Defaults that a Hugging Face folder has for requests: generation_config.json."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.json_file import read_json
from jaxinfer.request import LIMITS, SAMPLING_OPTIONS, Ending, SamplingParams

GENERATION_CONFIG = "generation_config.json"
MAX_GENERATION_CONFIG_BYTES = 1 << 20

# Added to the logit of what is never to come: as low as a request may ask for.
_NEVER = LIMITS["logit_bias"].low
# Fields that no token follows from, by how their names begin: of caches, of what is returned, of
# drafting, of searches with beams (whose number is named), and tokens that are read elsewhere.
_HARMLESS = (
    *("_", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("decoder_start_token_id", "do_sample", "use_cache", "cache_", "compile_", "disable_compile"),
    *("low_memory", "prefill_chunk_size", "output_", "return_", "trust_remote_code", "chat_format"),
    *("assistant_", "is_assistant", "num_assistant_", "target_lookbehind", "prompt_lookup_"),
    *("max_matching_", "early_stopping", "length_penalty", "renormalize_logits"),
    "remove_invalid_values",
)
# Looked at by transformers only where tokens are sampled.
_SAMPLED = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


@dataclass(frozen=True)
class Generation:
    """Defaults of requests, and the fields, with their values, that come to nothing here."""

    sampling: SamplingParams
    ending: Ending
    unread: tuple[str, ...] = ()


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The fields of the file, none where there is none. Raises ``ValueError`` for a damaged one."""
    path = folder / GENERATION_CONFIG
    return read_json(path, MAX_GENERATION_CONFIG_BYTES) if path.exists() else {}


def read_generation(folder: Path, vocab_size: int) -> Generation:
    """The defaults that the folder asks for; greedy unless it says ``do_sample``, as there.

    What a field leaves out is off, also where transformers has a default of its own (top_k 50).
    Raises ``ValueError`` for values that no request may have.
    """
    fields = read_generation_config(folder)
    try:
        sampling, taken = _sampling(fields), {option.name for option in SAMPLING_OPTIONS}
        taken -= {option.name for option in SAMPLING_OPTIONS if not option.has_model_default}
        biases = dict[int, float]()
        for name, found in _biases(fields, vocab_size).items():
            if found is not None and len(biases | found) <= LIMITS["num_logit_bias"].high:
                biases = {**found, **biases}
                taken.add(name)
        sampling = dataclasses.replace(sampling, logit_bias=tuple(sorted(biases.items())))
        ending, ended = _ending(fields)
    except ValueError as error:
        raise ValueError(f"{folder / GENERATION_CONFIG}: {error}") from error
    return Generation(sampling, ending, tuple(_unread(fields, taken | ended)))


def _sampling(fields: Mapping[str, Any]) -> SamplingParams:
    is_sampled = fields.get("do_sample") is True
    sampling = SamplingParams(temperature=1.0) if is_sampled else SamplingParams()
    read = ("always", "sampled") if is_sampled else ("always",)
    names = [option.name for option in SAMPLING_OPTIONS if option.model_default in read]
    wanted = {name: fields[name] for name in names if fields.get(name) is not None}
    for name, value in wanted.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, got {value!r:.40}")
    return dataclasses.replace(sampling, **wanted)


def _biases(fields: Mapping[str, Any], vocab_size: int) -> dict[str, dict[int, float] | None]:
    """Additions to logits, by field; None for one with sequences of tokens.

    Ids beyond the vocabulary are nobody's.
    """
    suppressed = fields.get("suppress_tokens") or []
    words = fields.get("bad_words_ids") or []
    pairs = fields.get("sequence_bias") or []
    if not isinstance(suppressed, list):
        raise ValueError(f"suppress_tokens must be a list of token ids, got {suppressed!r:.40}")
    for name, value in (("bad_words_ids", words), ("sequence_bias", pairs)):
        if not isinstance(value, list) or not all(isinstance(item, list) for item in value):
            raise ValueError(f"{name} must be a list of lists, got {value!r:.40}")
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"sequence_bias must be pairs of token ids and a bias, got {pairs!r:.40}")
    by_name = {
        "suppress_tokens": [([token_id], _NEVER) for token_id in suppressed],
        "bad_words_ids": [(word, _NEVER) for word in words],
        "sequence_bias": pairs,
    }
    return {name: _single(name, biased, vocab_size) for name, biased in by_name.items()}


def _single(name: str, biased: list[Any], vocab_size: int) -> dict[int, float] | None:
    found = dict[int, float]()
    for ids, bias in biased:
        for token_id in ids if isinstance(ids, list) else [ids]:
            if type(token_id) is not int or token_id < 0:
                raise ValueError(f"{name} must have token ids, got {token_id!r:.40}")
        if not isinstance(ids, list) or len(ids) != 1:
            return None
        LIMITS["logit_bias"].check(f"bias of token {ids[0]} in {name}", bias)
        if ids[0] < vocab_size:
            found[ids[0]] = float(bias)
    return found


def _ending(fields: Mapping[str, Any]) -> tuple[Ending, set[str]]:
    """Ends of texts, and the fields that were read for them."""
    taken = set[str]()
    stops = fields.get("stop_strings") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"stop_strings must be a list of strings, got {stops!r:.40}")
    lengths = LIMITS["stop_characters"]
    fits = all(lengths.low <= len(stop) <= lengths.high for stop in stops)
    if fits and len(stops) <= LIMITS["num_stop"].high:
        taken.add("stop_strings")
    else:
        stops = []
    min_tokens = fields.get("min_new_tokens")
    if min_tokens is not None:
        LIMITS["min_tokens"].check("min_new_tokens", min_tokens)
        if type(min_tokens) is not int:
            raise ValueError(f"min_new_tokens must be a whole number, got {min_tokens!r:.40}")
        taken.add("min_new_tokens")
    return Ending(stop=tuple(stops), min_tokens=min_tokens or 0), taken


def _unread(fields: Mapping[str, Any], taken: set[str]) -> Iterator[str]:
    for name, value in fields.items():
        if name in taken or name.startswith(_HARMLESS) or _is_neutral(name, value):
            continue
        if name in _SAMPLED and fields.get("do_sample") is not True:
            continue
        yield f"{name:.60} {value!r:.40}"


def _is_neutral(name: str, value: object) -> bool:
    if name == "max_length":
        return value == 20  # transformers' own default
    return not value or (value == 1 and value is not True)
