"""The sandbox of chat templates: no Python internals, bounded time, bounded sizes.

Jinja2's immutable sandbox keeps a template from the interpreter. On top of it, one rendering may
take ``MAX_SECONDS`` of processor time, looked at in every loop, call and output; may write
``MAX_CHARACTERS`` in all, captured text included; and no operator, filter or method that it may use
makes more than that at once.
"""

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2.0
MAX_CHARACTERS = 8 << 20
MAX_RANGE_ITEMS = 100_000  # of all ranges in one rendering
MAX_VALUES = 100_000  # in one list or object that is written
MAX_EXPONENT = 64

# Filters and globals that make much out of little, and that no template needs.
_REMOVED_FILTERS = (
    *("batch", "center", "filesizeformat", "format", "pprint", "slice", "urlize", "wordwrap"),
    "xmlattr",
)
_REMOVED_GLOBALS = ("lipsum", "cycler", "joiner")
# Methods of str that pad to a width, likewise.
_REMOVED_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map")
# Names that no template can write.
_COUNTED, _JOINED = "counted items", "joined values"


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment of one template, for one rendering at a time in each thread."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=_written,
        )
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name in _REMOVED_GLOBALS:
            del self.globals[name]
        self._left = _Left()
        self.filters.update(
            {
                "tojson": self._to_json,
                "indent": self._indent,
                "replace": self._replace,
                "join": self._join,
                "string": self.text_of,
                _COUNTED: self._counted,
                _JOINED: self._join,
            }
        )
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, range=self._range
        )

    @contextmanager
    def one_rendering(self) -> Iterator[None]:
        """Around a rendering: what is left of time and sizes begins anew."""
        self._left.start()
        yield

    def check_time(self) -> None:
        """Raises ``ValueError`` when the rendering has taken too long."""
        if time.thread_time() > self._left.until:
            raise ValueError(f"it takes more than {MAX_SECONDS:g} s")

    def text_of(self, value: object) -> str:
        """``str(value)``, of what is not too large for it."""
        if not isinstance(value, str):
            _check_size(value)
        return str(value)

    def written(self, value: object) -> str:
        """Returns the text that is about to be written, and counts it."""
        self.check_time()
        text = self.text_of(value)
        self._left.characters -= len(text)
        if self._left.characters < 0:
            raise ValueError(f"its output exceeds the limit of {MAX_CHARACTERS} characters")
        return text

    # ------------------------------------------------------------- what jinja2 calls

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Puts our counting into loops, constant text and ``~``."""
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            if loop.recursive:
                raise jinja2.TemplateSyntaxError("recursive loops are not supported", loop.lineno)
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None)
        for output in template.find_all(nodes.Output):
            output.nodes = [
                nodes.Const(node.data) if isinstance(node, nodes.TemplateData) else node
                for node in output.nodes
            ]
        return _without_concat(template)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _REMOVED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        # Jinja2 would hand out its own safe str.format before asking is_safe_attribute; its
        # widths allocate all the same.
        return None

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str) and called.__name__ in ("replace", "join"):
            if kwargs.keys() - {"_loop_vars", "_block_vars"}:  # jinja2's own
                raise ValueError(f"{called.__name__} takes no keywords")
            if called.__name__ == "replace":
                return self._replace(owner, *args)
            return self._join(*args, between=owner)
        # Its parameters have names that a class mangles: pyright counts them wrongly.
        return super().call(context, called, *args, **kwargs)  # pyright: ignore

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise ValueError("formatting with % is not supported")
        if operator == "**" and not (abs(left) <= 1 << 64 and abs(right) <= MAX_EXPONENT):
            raise ValueError(f"{left!r:.40} ** {right!r:.40} is beyond the limit of {MAX_EXPONENT}")
        if operator in "+*":
            size = _size(left) + _size(right) if operator == "+" else _product_size(left, right)
            _check_made(operator, size)
        return super().call_binop(context, operator, left, right)

    # ------------------------------------------------------------ filters and functions

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.check_time()
            yield item

    def _range(self, *arguments: int) -> range:
        """Python's, of which one rendering may go through MAX_RANGE_ITEMS in total."""
        result, left = range(*arguments), self._left.range_items
        # Counting from len() would overflow for a range beyond the machine's integers.
        if result and len(result[: left + 1]) > left:
            raise ValueError(f"ranges of more than {MAX_RANGE_ITEMS} items")
        self._left.range_items -= len(result)
        return result

    def _replace(self, text: object, old: str, new: str, count: int | None = None) -> str:
        text = self.text_of(text)
        found = text.count(old) if count is None or count < 0 else min(text.count(old), count)
        _check_made("replace", len(text) + found * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _join(self, values: Iterable[Any], between: str = "", attribute: object = None) -> str:
        if attribute is not None:
            raise ValueError("join by attribute is not supported: map the attribute first")
        texts, size = [], 0
        for value in values:
            self.check_time()
            texts.append(self.text_of(value))
            size += len(texts[-1]) + len(between)
            _check_made("join", size)
        return between.join(texts)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as it is, where jinja2's own filter would escape it for HTML."""
        if indent is not None and not 0 <= indent <= 16:
            raise ValueError(f"the indent of tojson must be in [0, 16], got {indent}")
        _check_size(value)
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def _indent(self, value: object, width: int = 4, first: bool = False, blank: bool = False):
        if not isinstance(width, int) or not 0 <= width <= 16:
            raise ValueError(f"the width of indent must be in [0, 16], got {width!r:.40}")
        lines = self.text_of(value).split("\n")
        _check_made("indent", sum(map(len, lines)) + (width + 1) * len(lines))
        return "\n".join(
            " " * width + line if (number or first) and (line or blank) else line
            for number, line in enumerate(lines)
        )


class _Generation(Extension):
    """``{% generation %}``, which marks what a model is trained on: here, what is in it."""

    tags: set[str] = {"generation"}  # noqa: RUF012  # as the class above declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Left(threading.local):
    """Allowances that a rendering has left, in the thread that does it."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.until = time.thread_time() + MAX_SECONDS
        self.characters = MAX_CHARACTERS
        self.range_items = MAX_RANGE_ITEMS


@jinja2.pass_context
def _written(context: Context, value: object) -> str:
    environment = context.environment
    assert isinstance(environment, TemplateSandbox)
    return environment.written(value)


def _without_concat(node: nodes.Node) -> Any:
    """``node`` with a filter of ours in place of each ``~``."""
    for name, child in node.iter_fields():
        if isinstance(child, nodes.Node):
            setattr(node, name, _without_concat(child))
        elif isinstance(child, list):
            setattr(
                node,
                name,
                [_without_concat(c) if isinstance(c, nodes.Node) else c for c in child],
            )
    if isinstance(node, nodes.Concat):
        return nodes.Filter(nodes.List(node.nodes), _JOINED, [], [], None, None)
    return node


def _check_made(what: str, size: int) -> None:
    if size > MAX_CHARACTERS:
        raise ValueError(f"{what} makes {size} elements, more than {MAX_CHARACTERS}")


def _check_size(value: object) -> None:
    """Refuses lists and objects whose text would be too long: one within another many times."""
    size, count, open_values = 0, 0, [value]
    while open_values:
        value = open_values.pop()
        size, count = size + _size(value), count + 1
        _check_made("a list or an object", size)
        if count > MAX_VALUES:
            raise ValueError(f"a list or an object has more than {MAX_VALUES} values")
        if isinstance(value, Mapping):
            open_values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            open_values += value


def _size(value: Any) -> int:
    """Returns the size of a copy of the value: elements, bytes of a whole number, or 0."""
    if isinstance(value, int):
        return value.bit_length() // 8
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _product_size(left: Any, right: Any) -> int:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
            return len(sequence) * max(times, 0)
    return _size(left) + _size(right)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    """The local time. Widths, as in ``%999999d``, are refused: they allocate."""
    if len(format) > 256 or re.search(r"%[-_^#0-9]*[1-9]", format):
        raise ValueError(f"time format {format!r:.40} is not supported")
    return datetime.now().strftime(format)
