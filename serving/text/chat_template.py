"""A checkpoint's chat template, rendered in a sandbox.

A template is a program from a file that somebody else made; template_sandbox.py says what it may
do. Messages are data, never templates.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

from serving.text.template_sandbox import TemplateSandbox

MAX_TEMPLATE_CHARACTERS = 1 << 20

ROLES = ("system", "user", "assistant", "tool")

_OWN_VARIABLES = frozenset(("messages", "add_generation_prompt", "tools", "documents", "range"))


class ChatTemplate:
    """Renders messages to a prompt. Raises ``ValueError`` when ``source`` is no valid template.

    ``special_tokens`` are further variables of the template: ``bos_token``, ``pad_token``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(
                f"the chat template has {len(source)} characters, "
                f"more than the limit of {MAX_TEMPLATE_CHARACTERS}"
            )
        self._environment = environment = TemplateSandbox()
        try:
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
            variables = jinja2.meta.find_undeclared_variables(parsed)
            constants = [node.value for node in parsed.find_all(jinja2.nodes.Const)]
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"the chat template is not valid: {_one_line(error)}") from error
        self._special_tokens = dict(special_tokens)
        self._knows_tools = "tools" in variables
        # Those that the template asks for by name; others it may write as they are.
        self._roles = {*ROLES, *(value for value in constants if isinstance(value, str))}
        # Those that are neither ours nor functions of the environment.
        self._free_variables = (
            variables - _OWN_VARIABLES - special_tokens.keys() - environment.globals.keys()
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        arguments: Mapping[str, str | bool] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Returns the prompt for ``messages``, each with ``content`` and a ``role``.

        A role is one of ROLES, or another that the template asks for or writes (developer,
        ipython): of a message with any other nothing might be left.
        They may have a ``name``, ``tool_calls`` and a ``tool_call_id``. ``arguments`` are further
        variables of the template. Raises ``ValueError`` for other messages, for arguments and tools
        that the template does not know, and for whatever the template itself refuses.
        """
        for message in messages:
            _check(message)
        for name in arguments or {}:
            if name not in self._free_variables:
                raise ValueError(f"the chat template has no variable {name!r:.80} to be set")
        if tools and not self._knows_tools:
            raise ValueError("the chat template knows no tools")
        variables = {
            **(arguments or {}),
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
        }
        if any(map(_only_calls, messages)) and not self._shows_calls(variables):
            # DeepSeek's look for calls only where there is no content; here that is "".
            without = [{**m, "content": None} if _only_calls(m) else dict(m) for m in messages]
            variables["messages"] = without
            if not self._shows_calls(variables):
                raise ValueError("the chat template leaves out an assistant's calls of tools")
        text = self._rendered(variables)
        for message in messages:
            if message["role"] not in self._roles and message["role"] not in text:
                raise ValueError(
                    f"role must be one of {', '.join(ROLES)} or what else the chat template knows, "
                    f"got {message['role']!r:.40}"
                )
        return text

    def _rendered(self, variables: Mapping[str, Any]) -> str:
        try:
            with self._environment.one_rendering():
                return self._template.render(variables)
        # The template is foreign code: whatever goes wrong in it is the input's fault.
        except Exception as error:
            raise ValueError(
                f"the chat template failed on these messages: {_one_line(error)}"
            ) from error

    def _shows_calls(self, variables: Mapping[str, Any]) -> bool:
        """Tells if functions of calls, under a name that is nowhere else, come in the text."""
        mark = secrets.token_hex(16)
        renamed = [_renamed(message, mark) for message in variables["messages"]]
        if renamed == variables["messages"]:
            return True  # of another form, which the template may know
        try:
            return mark in self._rendered({**variables, "messages": renamed})
        except ValueError:
            return False

    def render_open(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, str | bool] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Returns the beginning of the prompt that ends with the content of the last message.

        Raises ``ValueError`` as ``render`` does, without messages, and when the template alters
        the content so that its end cannot be found.
        """
        closed = self.render(messages, False, arguments, tools)
        if not messages:
            raise ValueError("there is no last message to continue")
        # Looking for the content itself could find it in what the template writes behind it.
        mark = secrets.token_hex(16)
        content = messages[-1]["content"]
        last = {**messages[-1], "content": content + mark}
        marked = self.render([*messages[:-1], last], False, arguments, tools)
        before, found, _ = marked.rpartition(mark)
        # A template that trims the content leaves out the white space at its end.
        for text in (before, before.rstrip()):
            if found and closed.startswith(text) and text.rstrip().endswith(content.strip()):
                return text
        raise ValueError("the chat template alters the last message: it cannot be continued")


def _check(message: Mapping[str, Any]) -> None:
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise ValueError(f"every message needs a {key} that is a string")
    if not isinstance(message.get("name", ""), str):
        raise ValueError("the name of a message must be a string")


def _only_calls(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls")) and not message["content"]


def _renamed(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The message with calls of a function called ``name``; others are left alone."""
    if not _only_calls(message):
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "name": name}}
        if isinstance(call.get("function"), Mapping)
        else call
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
