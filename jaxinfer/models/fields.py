"""Fields of a ``config.json``, checked as they are read; and those that all families share.

The fields come from a file that somebody else made: types and ranges are checked here, so that
families only say which they need and what they can compute.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from jaxinfer.config import RopeScaling

# Far above what models have; nothing is allocated by these alone.
MAX_SIZE = 1 << 30
MAX_LAYERS = 4096
MAX_ROPE_FACTORS = 4096
# What float32 computes with, products included, without an overflow.
MIN_NUMBER, MAX_NUMBER = 1e-15, 1e15

RopeKind = Literal["linear", "llama3", "factors", "yarn", "longrope"]


class Fields:
    """Typed access to a JSON object. Every method raises ``ValueError`` naming field and value.

    A field that is null is one that is absent. Which fields were read is kept, for ``unread``.
    """

    def __init__(self, fields: Mapping[str, Any], where: str = "") -> None:
        self._fields, self._where = fields, where
        self._read, self._children = set[str](), dict[str, Fields]()

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Fields":
        """The same fields, ``defaults`` where there is none."""
        given = {name: value for name, value in self._fields.items() if value is not None}
        fields = Fields({**defaults, **given}, self._where)
        fields._read, fields._children = self._read, self._children
        return fields

    def has(self, name: str) -> bool:
        """Tells whether a field is there."""
        return self._fields.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Tells whether a field is there and null, where that is not the same as none at all."""
        return name in self._fields and self._fields[name] is None

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        """A whole number in [low, MAX_SIZE]."""
        value = self._get(name, default)
        if type(value) is not int or not low <= value <= MAX_SIZE:
            self._refuse(name, value, f"a whole number in [{low}, {MAX_SIZE}]")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number in [MIN_NUMBER, MAX_NUMBER]."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not MIN_NUMBER <= value <= MAX_NUMBER:
            wanted = f"a positive number in [{MIN_NUMBER}, {MAX_NUMBER}]"
            self._refuse(name, value, wanted)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if type(value) is not bool:
            self._refuse(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(name, default)
        if type(value) is not str:
            self._refuse(name, value, "a string")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers in [MIN_NUMBER, MAX_NUMBER], at most MAX_ROPE_FACTORS."""
        value = self._get(name, None)
        if (
            not isinstance(value, list | tuple)
            or len(value) > MAX_ROPE_FACTORS
            or not all(type(x) in (int, float) and MIN_NUMBER <= x <= MAX_NUMBER for x in value)
        ):
            self._refuse(name, value, f"at most {MAX_ROPE_FACTORS} positive numbers")
        return tuple(float(x) for x in value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings, at most MAX_LAYERS."""
        value = self._get(name, None)
        if (
            not isinstance(value, list | tuple)
            or len(value) > MAX_LAYERS
            or not all(type(x) is str for x in value)
        ):
            self._refuse(name, value, f"at most {MAX_LAYERS} strings")
        return tuple(value)

    def fields(self, name: str) -> "Fields":
        """An object within the object."""
        value = self._get(name, None)
        if not isinstance(value, Mapping):
            self._refuse(name, value, "an object")
        if name not in self._children:
            self._children[name] = Fields(value, f"{self._where}{name}.")
        return self._children[name]

    @property
    def children(self) -> Iterable["Fields"]:
        """The objects within that were read."""
        return self._children.values()

    @property
    def is_rotation(self) -> bool:
        """Tells if this is an object that describes a rotation, or within one."""
        return self._where.split(".", 1)[0] in ("rope_scaling", "rope_parameters")

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Yields the fields that were not read, with their values."""
        yield from ((name, v) for name, v in self._fields.items() if name not in self._read)

    def expect(self, name: str, *allowed: object) -> None:
        """Refuses a field that is there with a value not among ``allowed``."""
        self._read.add(name)
        value = self._fields.get(name)
        if value is not None and not any(type(x) is type(value) and x == value for x in allowed):
            only = " or ".join(f"{x!r:.80}" for x in allowed)
            ending = f"; only {only} is supported" if allowed else ", which is not supported"
            raise ValueError(f"{self._where}{name} is {value!r:.80}{ending}")

    def _get(self, name: str, default: object) -> Any:
        self._read.add(name)
        value = self._fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self._where}{name} is missing")
        return value

    def _refuse(self, name: str, value: object, wanted: str) -> None:
        raise ValueError(f"{self._where}{name} must be {wanted}, got {value!r:.80}")


def common_fields(fields: Fields, activation: str = "silu") -> dict[str, Any]:
    """Returns fields of ``ModelConfig`` that all families read alike; refuses other activations."""
    names = (activation, "swish") if activation == "silu" else (activation,)  # the same
    for name in ("hidden_act", "hidden_activation"):
        fields.expect(name, *names)
    num_layers = fields.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {num_layers}, more than the limit of {MAX_LAYERS}")
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    theta, scaling = rope_fields(fields)
    return {
        "architecture": fields.text("model_type"),
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", num_heads),
        "head_dim": fields.integer("head_dim", max(1, hidden_size // num_heads)),
        "max_position_embeddings": served_context(fields, scaling),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
    }


def served_context(fields: Fields, scaling: RopeScaling | None) -> int:
    """The most positions that a text may have.

    With yarn those that the rule stretches to, where ``max_position_embeddings`` is still what it
    stretches: so the cards of Qwen's models say to switch it on.
    """
    context = fields.integer("max_position_embeddings")
    if scaling is None or scaling.kind != "yarn":
        return context
    stretched = int(scaling.factor * scaling.original_max_position_embeddings)
    return min(max(context, stretched), MAX_SIZE)


def window_fields(fields: Fields, num_layers: int) -> dict[str, Any]:
    """``sliding_window`` and ``layer_types`` as arguments of ``ModelConfig``."""
    window = fields.integer("sliding_window") if fields.has("sliding_window") else None
    types = fields.texts("layer_types") if fields.has("layer_types") else ()
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer_types has {kind!r:.40}; full_attention and sliding_attention are supported"
            )
    if types and len(types) != num_layers:
        raise ValueError(f"layer_types has {len(types)} entries, there are {num_layers} layers")
    if types and "sliding_attention" not in types:
        window, types = None, ()
    if types and "full_attention" not in types:
        types = ()
    return {"sliding_window": window, "layer_types": types}


def single_window(fields: Fields, num_layers: int) -> dict[str, Any]:
    """``sliding_window`` of a family whose layers are all alike.

    Refuses ``layer_types`` that say otherwise: transformers does not look at them.
    """
    window = fields.integer("sliding_window") if fields.has("sliding_window") else None
    wanted = "full_attention" if window is None else "sliding_attention"
    fields.expect("layer_types", [wanted] * num_layers)
    return {"sliding_window": window}


def uses_windows(fields: Fields) -> bool:
    """Qwen's ``use_sliding_window``; refuses ``layer_types`` with windows where it is not set."""
    if fields.boolean("use_sliding_window", False):
        return True
    if fields.has("layer_types") and "sliding_attention" in fields.texts("layer_types"):
        raise ValueError("layer_types has sliding_attention, but use_sliding_window is not true")
    return False


def rope_fields(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from ``rope_scaling``, else ``rope_parameters``, else ``rope_theta``.

    In this order, which is that of transformers, where a file has several of them.
    """
    theta = fields.number("rope_theta", 10000.0)
    scaling = None
    for name in ("rope_scaling", "rope_parameters"):
        if fields.has(name):
            rope = fields.fields(name)
            theta, scaling = rope.number("rope_theta", theta), rope_scaling(rope, fields)
            break
    if theta <= 1:
        raise ValueError(f"rope_theta must be above 1, got {theta}")
    return theta, scaling


def rope_scaling(rope: Fields, fields: Fields) -> RopeScaling | None:
    """A rule for stretched frequencies; ``fields`` are those of the model around it."""
    kind = rope.text("rope_type", rope.text("type", "default"))
    context = fields.integer("max_position_embeddings")
    original = rope.integer("original_max_position_embeddings", context)
    original = fields.integer("original_max_position_embeddings", original)
    match kind:
        case "default":
            return None
        case "linear":
            factor = rope.number("factor")
            return None if factor == 1 else RopeScaling("linear", factor=factor)
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if not low < high:
                raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
            return RopeScaling(
                "llama3",
                factor=rope.number("factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position_embeddings=original,
            )
        case "factors":
            return RopeScaling("factors", factors=rope.numbers("factors"))
        case "yarn":
            rope.expect("truncate", True)
            factor = rope.number("factor")
            # A factor on top of the rule's own, as vLLM and llama.cpp have it; transformers does
            # not look at it. DeepSeek-R1-0528-Qwen3-8B takes the rule's back with it.
            grown = _yarn_attention_factor(rope, factor) * rope.number("attn_factor", 1.0)
            return RopeScaling(
                "yarn",
                factor=factor,
                original_max_position_embeddings=original,
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                attention_factor=rope.number("attention_factor", grown),
            )
        case "longrope" | "su":  # what it was called at first
            factor = max(1.0, rope.number("factor", context / original))
            grown = math.sqrt(1 + math.log(factor) / math.log(original)) if original > 1 else 1.0
            return RopeScaling(
                "longrope",
                factors=rope.numbers("long_factor"),
                short_factors=rope.numbers("short_factor"),
                original_max_position_embeddings=original,
                attention_factor=rope.number("attention_factor", grown),
            )
    raise ValueError(
        f"rope_type {kind!r:.40} is not supported; supported are default, linear, llama3, yarn and "
        "longrope"
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """The paper's; of two scales that a file has, as DeepSeek's do, their ratio."""
    scales = [rope.number(name, 1.0) for name in ("mscale", "mscale_all_dim")]
    if not (rope.has("mscale") and rope.has("mscale_all_dim")):
        scales = [1.0, 0.0]  # one of them alone is not looked at
    above, below = (0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in scales)
    return above / below
