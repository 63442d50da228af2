"""Checkpoints that many people run, rebuilt small: their files' every key, with smaller sizes.

tests/data/popular_checkpoints has a file for each: its ``source``, its files, and what is to be
read. Ids of special tokens are those of the small vocabulary, in the same order.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data" / "popular_checkpoints"
CHECKPOINTS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))
}
_OF_TRANSFORMERS = DATA.parent / "chat_template_reference.json"
HEAD_DIM = 16
_HIDDEN_SIZE, _INTERMEDIATE_SIZE, _GROUP = 64, 96, 16
# Gemma's layers come in sixes.
NUM_LAYERS: Mapping[str, int] = {"gemma3": 6, "gemma3_text": 6}
# Rows behind the last token, where the checkpoint has some.
_NUM_FILLERS = 7
# Special tokens with ids below come before the ordinary ones.
_FIRST_IDS = 1000


def template(name: str) -> str:
    """Returns a template that a file names after an "@"."""
    path = DATA / "templates" / f"{name.removeprefix('@')}.jinja"
    if path.exists():
        return path.read_text()
    return json.loads(_OF_TRANSFORMERS.read_text())["templates"][name.removeprefix("@")]


class SmallVocabulary:
    """The ``tokens`` of a small vocabulary: ``special`` ones by their real ids, and ``ordinary``.

    ``vocab_size`` is the real one, None where nothing is said.
    """

    def __init__(
        self, special: Mapping[int, str], ordinary: Iterable[str], vocab_size: int | None
    ) -> None:
        ids = sorted(special)
        first, last = (
            [i for i in ids if (i < _FIRST_IDS) == is_first] for is_first in (True, False)
        )
        ordinary = [token for token in ordinary if token not in special.values()]
        self.tokens = [*(special[i] for i in first), *ordinary, *(special[i] for i in last)]
        self._ids = {real: self.tokens.index(special[real]) for real in ids}
        self.num_rows = vocab_size
        if vocab_size is not None:
            within = sum(real < vocab_size for real in last)
            fillers = _NUM_FILLERS if last and vocab_size > max(last) + 1 else 0
            self.num_rows = len(first) + len(ordinary) + within + fillers

    def remapped(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns ``fields``, and those within, with the small vocabulary's ids."""
        return {name: self._remapped(name, value) for name, value in fields.items()}

    def id_of(self, real: int) -> int:
        """Returns the small id of a special token."""
        return self._ids[real]

    def _remapped(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return self.remapped(value)
        if value is None or not name.endswith(("_token_id", "_token_index")):
            return value
        return [self._ids[one] for one in value] if isinstance(value, list) else self._ids[value]


def shrink(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json's fields with small sizes; what it leaves out is left out still."""
    small = dict(fields)
    if "text_config" in small:
        small["text_config"] = shrink(small["text_config"])
        return small
    heads, head_dim = small.get("num_attention_heads"), small.get("head_dim")
    small["hidden_size"] = _HIDDEN_SIZE if heads else HEAD_DIM  # with as many rows as the real one
    if heads:
        groups = heads // small["num_key_value_heads"]
        small["num_key_value_heads"] = min(2, small["num_key_value_heads"])
        small["num_attention_heads"] = groups * small["num_key_value_heads"]
        if head_dim:
            small["head_dim"] = HEAD_DIM
        else:
            small["hidden_size"] = HEAD_DIM * small["num_attention_heads"]
    if head_dim and small.get("query_pre_attn_scalar") == head_dim:
        small["query_pre_attn_scalar"] = HEAD_DIM
    small["intermediate_size"] = _INTERMEDIATE_SIZE
    small["num_hidden_layers"] = NUM_LAYERS.get(small["model_type"], 2)
    if "layer_types" in small:
        small["layer_types"] = small["layer_types"][: small["num_hidden_layers"]]
    rope = small.get("rope_scaling")
    if rope and "long_factor" in rope:
        number = int(HEAD_DIM * small["partial_rotary_factor"]) // 2
        step = len(rope["long_factor"]) // number
        fewer = {name: rope[name][::step][:number] for name in ("long_factor", "short_factor")}
        small["rope_scaling"] = {**rope, **fewer}
    if "quantization_config" in small:
        small["quantization_config"] = {**small["quantization_config"], "group_size": _GROUP}
    return small
