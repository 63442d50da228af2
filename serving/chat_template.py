"""A checkpoint's chat template, rendered in a sandbox.

A template is a program from a file that somebody else made. It sees the messages and a few plain
functions, no Python internals. Its output, its ranges and what its operators make are bounded, so
the plain ways to exhaust memory or time are closed; nested loops over long messages stay slow, and
text captured and joined again and again can still grow. Messages are data, never templates.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_OUTPUT_CHARACTERS = 8 << 20
MAX_RANGE_ITEMS = 100_000  # of all ranges in one rendering
MAX_EXPONENT = 64

ROLES = ("system", "user", "assistant", "tool")

_OWN_VARIABLES = frozenset(("messages", "add_generation_prompt", "tools", "documents", "range"))

# Filters and globals that make long strings out of short arguments, and that no template needs.
_REMOVED_FILTERS = ("center", "format", "filesizeformat", "pprint", "wordwrap", "urlize", "xmlattr")
_REMOVED_GLOBALS = ("lipsum", "cycler", "joiner")
# Methods of str that pad to a width, likewise.
_REMOVED_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map")


class ChatTemplate:
    """Renders messages to a prompt. Raises ``ValueError`` when ``source`` is no valid template.

    ``special_tokens`` are further variables of the template, ``bos_token`` and ``eos_token``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(
                f"the chat template has {len(source)} characters, "
                f"more than the limit of {MAX_TEMPLATE_CHARACTERS}"
            )
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        try:
            self._template = environment.from_string(source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"the chat template is not valid: {_one_line(error)}") from error
        self._special_tokens = dict(special_tokens)
        # Those that are neither ours nor functions of the environment.
        self._free_variables = (
            variables - _OWN_VARIABLES - special_tokens.keys() - environment.globals.keys()
        )

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool,
        arguments: Mapping[str, str | bool] | None = None,
    ) -> str:
        """Returns the prompt for ``messages``, each with ``content`` and a ``role`` of ROLES.

        They may have a ``name``. ``arguments`` are further variables of the template. Raises
        ``ValueError`` for other messages, for arguments that the template does not know, and for
        whatever the template itself refuses.
        """
        for message in messages:
            _check(message)
        for name in arguments or {}:
            if name not in self._free_variables:
                raise ValueError(f"the chat template has no variable {name!r:.80} to be set")
        variables = {
            **(arguments or {}),
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            "range": _BoundedRange(),
        }
        pieces, num_characters = [], 0
        try:
            for piece in self._template.generate(variables):
                num_characters += len(piece)
                if num_characters > MAX_OUTPUT_CHARACTERS:
                    raise ValueError(
                        f"its output exceeds the limit of {MAX_OUTPUT_CHARACTERS} characters"
                    )
                pieces.append(piece)
        # The template is foreign code: whatever goes wrong in it is the input's fault.
        except Exception as error:
            raise ValueError(
                f"the chat template failed on these messages: {_one_line(error)}"
            ) from error
        return "".join(pieces)

    def render_open(
        self,
        messages: Sequence[Mapping[str, str]],
        arguments: Mapping[str, str | bool] | None = None,
    ) -> str:
        """Returns the beginning of the prompt that ends with the content of the last message.

        Raises ``ValueError`` as ``render`` does, without messages, and when the template alters
        the content so that its end cannot be found.
        """
        closed = self.render(messages, False, arguments)
        if not messages:
            raise ValueError("there is no last message to continue")
        # Looking for the content itself could find it in what the template writes behind it.
        mark = secrets.token_hex(16)
        content = messages[-1]["content"]
        last = {**messages[-1], "content": content + mark}
        marked = self.render([*messages[:-1], last], False, arguments)
        before, found, _ = marked.rpartition(mark)
        # A template that trims the content leaves out the white space at its end.
        for text in (before, before.rstrip()):
            if found and closed.startswith(text) and text.rstrip().endswith(content.strip()):
                return text
        raise ValueError("the chat template alters the last message: it cannot be continued")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja2's immutable sandbox with what Hugging Face's chat templates expect, and bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name in _REMOVED_GLOBALS:
            del self.globals[name]
        self.filters["tojson"] = _to_json
        self.filters["indent"] = _indent
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _REMOVED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        # Jinja2 would hand out its own safe str.format before asking is_safe_attribute; its
        # widths allocate all the same.
        return None

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise ValueError("formatting with % is not supported")
        if operator == "**" and not (abs(left) <= 1 << 64 and abs(right) <= MAX_EXPONENT):
            raise ValueError(f"{left!r:.40} ** {right!r:.40} is beyond the limit of {MAX_EXPONENT}")
        if operator in "+*":
            size = _size(left) + _size(right) if operator == "+" else _product_size(left, right)
            if size > MAX_OUTPUT_CHARACTERS:
                raise ValueError(
                    f"{operator} makes {size} elements, more than {MAX_OUTPUT_CHARACTERS}"
                )
        return super().call_binop(context, operator, left, right)


class _BoundedRange:
    """Python's ``range`` for one rendering, which may go through MAX_RANGE_ITEMS in total."""

    def __init__(self) -> None:
        self._left = MAX_RANGE_ITEMS

    def __call__(self, *arguments: int) -> range:
        result = range(*arguments)
        # Counting from len() would overflow for a range beyond the machine's integers.
        if result and len(result[: self._left + 1]) > self._left:
            raise ValueError(f"ranges of more than {MAX_RANGE_ITEMS} items")
        self._left -= len(result)
        return result


def _check(message: Mapping[str, str]) -> None:
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise ValueError(f"every message needs a {key} that is a string")
    if not isinstance(message.get("name", ""), str):
        raise ValueError("the name of a message must be a string")
    if message["role"] not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {message['role']!r:.40}")


def _size(value: Any) -> int:
    """Returns how much is copied when the value is: elements, bytes of a whole number, or 0."""
    if isinstance(value, int):
        return value.bit_length() // 8
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _product_size(left: Any, right: Any) -> int:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
            return len(sequence) * max(times, 0)
    return _size(left) + _size(right)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Returns JSON as it is, where jinja2's own filter would escape it for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise ValueError(f"the indent of tojson must be in [0, 16], got {indent}")
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _indent(value: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, int) or not 0 <= width <= 16:
        raise ValueError(f"the width of indent must be in [0, 16], got {width!r:.40}")
    lines = str(value).split("\n")
    return "\n".join(
        " " * width + line if (number or first) and (line or blank) else line
        for number, line in enumerate(lines)
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    """Returns the local time. Widths, as in ``%999999d``, are refused: they allocate."""
    if len(format) > 256 or re.search(r"%[-_^#0-9]*[1-9]", format):
        raise ValueError(f"time format {format!r:.40} is not supported")
    return datetime.now().strftime(format)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
