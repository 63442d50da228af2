"""Damage to files, as hypothesis strategies: of bytes, and of JSON values before they are written.

Knows no format: a mutation is drawn as numbers, and applied to whatever file there is.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Mutation = Callable[[bytes], bytes]


def weighted[T](*parts: tuple[int, st.SearchStrategy[T]]) -> st.SearchStrategy[T]:
    """One of several strategies, each as often as its number says (``one_of`` counts none twice,
    and takes apart what is one of several itself)."""
    tickets = [number for number, (weight, _) in enumerate(parts) for _ in range(weight)]
    return st.sampled_from(tickets).flatmap(lambda number: parts[number][1])


# Hypothesis likes small numbers and round ones: multiplied, they are anywhere.
_ANY = st.integers(0, 2**32 - 1).map(lambda number: (number * 2654435761 + 1234567891) % 2**32)
_WIDTHS = st.sampled_from([1, 2, 4, 8])
# What counts, sizes and offsets are overwritten with; negative ones are those near 2**64.
_INTEGERS = st.one_of(
    st.sampled_from([0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]),
    st.sampled_from([2**40, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2, 2**64 - 32]),
    st.integers(0, 300),
    st.integers(0, 2**64 - 1),
)
_LENGTHS = st.one_of(st.integers(1, 16), st.sampled_from([32, 64, 512, 4096]), _ANY)


def byte_mutations(
    head: int, fields: Sequence[tuple[int, int]] = (), is_text: bool = False
) -> st.SearchStrategy[Mutation]:
    """One to three kinds of damage, one after another.

    Half of it goes to the first ``head`` bytes, where a file says what it is; ``fields`` are
    positions and widths of integers there, which are hit on purpose. ``is_text``: ASCII remains so.
    """
    position = st.tuples(st.booleans(), _ANY).map(
        lambda drawn: drawn[1] % head if drawn[0] else drawn[1]
    )
    steps: list[st.SearchStrategy[Mutation]] = [
        st.builds(_flip, position, st.integers(1, 127 if is_text else 255)),
        st.builds(_truncate, position),
        st.builds(_extend, st.binary(min_size=1, max_size=64), st.sampled_from([1, 1, 1, 1000])),
        st.builds(_duplicate, position, _LENGTHS, position),
        st.builds(_delete, position, _LENGTHS),
        st.builds(_swap, position, position, _LENGTHS),
    ]
    if not is_text:
        steps.append(st.builds(_overwrite, position, _WIDTHS, _INTEGERS))
    if fields:
        field = _ANY.map(lambda number: fields[number % len(fields)])
        overwritten = st.builds(lambda f, new: _overwrite(f[0], f[1], new), field, _INTEGERS)
        changed = st.builds(lambda f, by: _add(f[0], f[1], by), field, st.sampled_from([-1, 1, 32]))
        step = weighted((4, overwritten), (3, changed), (5, st.one_of(steps)))
    else:
        step = st.one_of(steps)
    one, several = (st.lists(step, min_size=low, max_size=high) for low, high in ((1, 1), (2, 3)))
    return weighted((2, one), (1, several)).map(_one_after_another)


def _one_after_another(steps: list[Mutation]) -> Mutation:
    def mutate(data: bytes) -> bytes:
        for step in steps:
            data = step(data)
        return data

    return mutate


def _at(data: bytes, position: int) -> int:
    return position % (len(data) or 1)


def _flip(position: int, bits: int) -> Mutation:
    def mutate(data: bytes) -> bytes:
        at = _at(data, position)
        return data[:at] + bytes(byte ^ bits for byte in data[at : at + 1]) + data[at + 1 :]

    return mutate


def _overwrite(position: int, width: int, value: int) -> Mutation:
    def mutate(data: bytes) -> bytes:
        at = _at(data, position)
        number = (value % 256**width).to_bytes(width, "little")
        return data[:at] + number[: len(data) - at] + data[at + width :]

    return mutate


def _add(position: int, width: int, by: int) -> Mutation:
    def mutate(data: bytes) -> bytes:
        at = _at(data, position)
        number = int.from_bytes(data[at : at + width], "little")
        return _overwrite(at, width, number + by)(data)

    return mutate


def _truncate(position: int) -> Mutation:
    return lambda data: data[: _at(data, position)]


def _extend(tail: bytes, times: int) -> Mutation:
    return lambda data: data + tail * times


def _duplicate(position: int, length: int, to: int) -> Mutation:
    def mutate(data: bytes) -> bytes:
        at, behind = _at(data, position), _at(data, to)
        # No more than the file again, or four of them would make it 16 times as long.
        part = data[at : at + length % (len(data) + 1)]
        return data[:behind] + part + data[behind:]

    return mutate


def _delete(position: int, length: int) -> Mutation:
    def mutate(data: bytes) -> bytes:
        at = _at(data, position)
        return data[:at] + data[at + length :]

    return mutate


def _swap(position: int, other: int, length: int) -> Mutation:
    def mutate(data: bytes) -> bytes:
        first, second = sorted((_at(data, position), _at(data, other)))
        size = min(length, second - first, len(data) - second)
        if not size:
            return data
        parts = data[:first], data[second : second + size], data[first + size : second]
        return b"".join((*parts, data[first : first + size], data[second + size :]))

    return mutate


class _Raw(str):
    """JSON text as it is, valid or not."""


class _Object(list[tuple[str, Any]]):
    """The pairs of a JSON object: keys may occur twice."""


_NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 7, 95, 100, 4096, 2**30, 2**31, 2**53, 2**63, 2**64, -(2**63)),
    *(0.0, -0.5, 1.5, 1e-300, 1e300, 1e-8),
    *(_Raw(text) for text in ("NaN", "-Infinity", "Infinity", "1e999", "-1e999", "-0")),
    *(_Raw("1" + "0" * size) for size in (30, 400, 5000)),
]
_STRINGS: list[Any] = [
    *("", "x", "a", "ab", "\n", "a\r\nb\u2028c", "\0", "../x", "[", "\u2581", "<0x41>", "<|end|>"),
    *("{{ 1 / 0 }}", "{% for", "{{ messages }}", "x" * 9000, _Raw('"\\ud800"')),
    *(
        "BPE",
        "ByteLevel",
        "Metaspace",
        "qwen2",
        "full_attention",
        "linear",
        "F32",
        "F16",
        "BF16",
        "I16",
    ),
]
_LISTS: list[Any] = [
    *(_Raw(text) for text in ("[]", "{}", "[0, null, []]", "[1e999]", "[[[]]]", "[" * 50_000, "")),
    *(_Raw("[" * depth + "]" * depth) for depth in (60, 90, 200, 900, 5000)),
    *(_Raw('{"a":' * depth + "1" + "}" * depth) for depth in (1, 50, 900, 5000)),
    _Raw("[" + "[]," * 9000 + "0]"),
]
_CONSTANTS = [None, True, False]
_VALUES = [*_NUMBERS, *_STRINGS, *_LISTS, *_CONSTANTS]


def json_mutations() -> st.SearchStrategy[Mutation]:
    """One or two changes of values, keys and their order in a JSON file.

    A node is found by going down a level at a time, so that a large list does not draw everything.
    """
    path = st.lists(_ANY, min_size=1, max_size=7)
    names = st.sampled_from(["", "x", "type", "model", "id", "\ud800"])
    steps = [
        (2, st.builds(_replaced, path, st.sampled_from(_VALUES))),
        (4, st.builds(_of_its_kind, path, _ANY)),
        (3, st.builds(_nudged, path, _ANY)),
        (2, st.builds(_copied, path, path)),
        (1, st.builds(_renamed, path, names)),
        (2, st.builds(_dropped, path)),
        *((1, st.builds(change, path)) for change in (_doubled, _wrapped, _keyed)),
    ]
    several = st.lists(weighted(*steps), min_size=1, max_size=2)

    def as_mutation(changes: list[Callable[[Any], Any]]) -> Mutation:
        def mutate(data: bytes) -> bytes:
            value = json.loads(data, object_pairs_hook=_Object)
            for change in changes:
                value = change(value)
            return _dump(value).encode(errors="surrogatepass")

        return mutate

    return several.map(as_mutation)


def _dump(value: Any) -> str:
    if isinstance(value, _Raw):
        return value
    if isinstance(value, _Object):
        pairs = (f"{_dump(name)}: {_dump(item)}" for name, item in value)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value)


# What becomes of a node: its name (None in a list) and value -> none, one or several of them.
_Change = Callable[[Any, Any], list[tuple[Any, Any]]]


def _changed(value: Any, path: Sequence[int], change: _Change) -> Any:
    """``value`` with the node that ``path`` leads to changed; a path may be longer than needed."""
    if not isinstance(value, list) or not value:
        return value
    is_object = isinstance(value, _Object)
    pairs: list[Any] = list(value) if is_object else [(None, item) for item in value]
    at = path[0] % len(pairs)
    name, child = pairs[at]
    if len(path) > 1 and isinstance(child, list) and child:
        pairs[at] = name, _changed(child, path[1:], change)
    else:
        pairs[at : at + 1] = change(name, child)
    return _Object(pairs) if is_object else [item for _, item in pairs]


def _replaced(path: list[int], new: Any) -> Callable[[Any], Any]:
    return lambda value: _changed(value, path, lambda name, _: [(name, new)])


def _wrapped(path: list[int]) -> Callable[[Any], Any]:
    return lambda value: _changed(value, path, lambda name, old: [(name, [old])])


def _keyed(path: list[int]) -> Callable[[Any], Any]:
    return lambda value: _changed(value, path, lambda name, old: [(name, _Object([("a", old)]))])


def _of_its_kind(path: list[int], number: int) -> Callable[[Any], Any]:
    """Another value of the type that is there."""
    kinds = {int: _NUMBERS, float: _NUMBERS, str: _STRINGS, bool: _CONSTANTS}

    def choose(name: Any, old: Any) -> list[tuple[Any, Any]]:
        values = kinds.get(type(old), _LISTS)
        return [(name, values[number % len(values)])]

    return lambda value: _changed(value, path, choose)


def _nudged(path: list[int], number: int) -> Callable[[Any], Any]:
    """A little other than it was: a number near by, a text or a list with a part less or more."""

    def nudge(name: Any, old: Any) -> list[tuple[Any, Any]]:
        if type(old) in (int, float):
            return [(name, (old + 1, old - 1, -old, old * 2, old * 1000)[number % 5])]
        at = number % len(old) if isinstance(old, str | list) and old else 0
        if isinstance(old, str) and old:
            return [(name, (old[:at] + old[at + 1 :], old[at:] + old)[number >> 20 & 1])]
        if isinstance(old, list) and old:
            several = [old[:at], old[at + 1 :], old[::-1], [*old[at:], *old[:at]]]
            return [(name, type(old)(several[number >> 20 & 3]))]
        return [(name, old)]

    return lambda value: _changed(value, path, nudge)


def _dropped(path: list[int]) -> Callable[[Any], Any]:
    return lambda value: _changed(value, path, lambda name, old: [])


def _doubled(path: list[int]) -> Callable[[Any], Any]:
    return lambda value: _changed(value, path, lambda name, old: [(name, old)] * 2)


def _renamed(path: list[int], new: str) -> Callable[[Any], Any]:
    return lambda value: _changed(value, path, lambda _, old: [(new, old)])


def _copied(path: list[int], source: list[int]) -> Callable[[Any], Any]:
    """Puts what is at ``source`` in the place of what is at ``path``."""

    def copy(value: Any) -> Any:
        found = value
        for step in source:
            if not isinstance(found, list) or not found:
                break
            chosen = found[step % len(found)]
            found = chosen[1] if isinstance(found, _Object) else chosen
        return _changed(value, path, lambda name, _: [(name, found)])

    return copy
