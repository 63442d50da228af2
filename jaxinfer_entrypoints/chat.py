"""Chats with a running server in a terminal or a pipe. ``python scripts/chat.py --help``."""

from jaxinfer_entrypoints.entry import run_main  # before all others: see there

# isort: split

import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from jaxinfer.request import LIMITS
from jaxinfer_entrypoints.command_line.chat import generate_options, parse_arguments
from serving.client import Client, ServerError
from serving.client.events import (
    Delta,
    Event,
    Finished,
    Started,
)
from serving.client.options import GenerateOptions, Message

COMMANDS = {
    "/reset": "forget the conversation; --system stays",
    "/history": "print the conversation",
    "/help": "print this",
    "/quit": "leave; Ctrl-D does too",
}
MAX_LINE_CHARACTERS = int(LIMITS["prompt_characters"].high)
CONNECT_SECONDS = 10.0
# How long a message waits for a server that was lost: a connection is tried again every second.
RETURN_SECONDS = 3.0
DIM, RED, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"


def main() -> None:
    """Entry point ``jaxinfer-chat``."""
    run_main(chat)


def chat() -> None:
    """Sends each line with all that was said before; ends at the end of the input.

    Exits with status 1 where standard input is no terminal and a line was not answered.
    """
    options = parse_arguments()
    wanted = generate_options(options)
    prepare_input()
    with Client(options.address) as client:
        greeting = greet(client, options.address, options.max_tokens)
        session = Session(client, options.address, wanted, options.system)
        if session.is_interactive:
            session.note(greeting)
        with session.interrupts.handled():
            session.run()
    if session.num_failures and not session.is_interactive:
        raise SystemExit(f"error: {session.num_failures} of the lines were not answered")


def greet(client: Client, address: str, max_tokens: int | None) -> str:
    """Asks what is served; raises ``ValueError`` in one line where nobody or nothing can answer.

    Nor can anybody answer with more tokens than the server has room for.
    """
    try:
        if not client.is_serving(timeout=CONNECT_SECONDS):
            raise ValueError(f"the server at {address} is loading its model: try again when it is")
        info = client.model_info(timeout=CONNECT_SECONDS)
    except ServerError as error:
        if error.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise ValueError(f"no jaxinfer server at {address}: {one_line(str(error))}") from None
        raise ValueError(
            f"nothing answers at {address}: start a server with jaxinfer-serve (or make serve), or "
            f"name another with --address ({one_line(error.message)})"
        ) from None
    name = one_line(info.model_name)
    if not info.has_chat_template:
        raise ValueError(f"{name}, served at {address}, has no chat template: it cannot chat")
    if max_tokens is not None and max_tokens >= info.max_model_len:
        raise ValueError(
            f"--max-tokens {max_tokens} leaves no room for a message: the server at {address} "
            f"takes {info.max_model_len} tokens, prompt included"
        )
    return f"{name} at {address}, up to {info.max_model_len} tokens; /help lists the commands"


@dataclass
class Interrupts:
    """Ctrl-C's effect: one KeyboardInterrupt where ``allowed``, nothing anywhere else."""

    _num_allowed: int = 0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Takes SIGINT over."""
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Once only: a second Ctrl-C must not disturb what the first one began."""
        self._num_allowed = 1
        try:
            yield
        finally:
            self._num_allowed = 0

    def _on_signal(self, *_: object) -> None:
        if self._num_allowed:
            self._num_allowed = 0
            raise KeyboardInterrupt


@dataclass
class Answer:
    """The answer to one message so far; times are of this process."""

    sent_at: float = 0.0
    texts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_first_tokens: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    started: Started | None = None
    finished: Finished | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, event: Event) -> str:
        """Takes an event; returns the text that is new."""
        match event:
            case Started():
                self.started = event
            case Finished():
                self.finished = event
            case Delta():
                self.last_at = time.perf_counter()
                if not self.num_tokens:
                    self.first_at, self.num_first_tokens = self.last_at, len(event.token_ids)
                self.num_tokens += len(event.token_ids)
                self.texts.append(event.text)
                return event.text
        return ""

    def describe(self) -> str:
        """Counts, rates and why it ended, in one line."""
        parts = [f"{self.num_tokens} tokens"]
        # What the first delta brought was not waited for one by one.
        later, seconds = self.num_tokens - self.num_first_tokens, self.last_at - self.first_at
        if later and seconds > 0:
            parts.append(f"{later / seconds:.1f} tokens/s")
        if self.num_tokens:
            parts.append(f"TTFT {1000 * (self.first_at - self.sent_at):.0f} ms")
        if self.started:
            prompt, cached = self.started.num_prompt_tokens, self.started.num_cached_tokens
            parts.append(f"prompt {prompt} tokens, {cached} cached")
        if self.finished is None:
            parts.append("stopped by Ctrl-C: what came stays in the history")
        elif self.finished.reason == "abort":
            parts.append("aborted by the server: what came stays in the history")
        else:
            parts.append(one_line(self.finished.reason))
        return ", ".join(parts)


class Session:
    """One conversation, on standard input and output; remarks go to stderr."""

    def __init__(
        self, client: Client, address: str, options: GenerateOptions, system: str | None
    ) -> None:
        self.interrupts = Interrupts()
        self.is_interactive = sys.stdin.isatty()
        self.num_failures = 0
        self._client, self._address, self._options = client, address, options
        self._system = [] if system is None else [Message("system", system)]
        self._history = list(self._system)
        self._is_lost = False
        if self.is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() uses it: editing, and history by arrow keys)

    def run(self) -> None:
        """Reads lines until there are no more."""
        while True:
            try:
                with self.interrupts.allowed():
                    line = self._read()
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                print()
                self.note("/quit or Ctrl-D leaves")
                continue
            except EOFError:
                if self.is_interactive:
                    print()
                return
            if line.rstrip() == "/quit":
                return
            if not is_text(line):
                self._refuse("this line is not UTF-8, and was not sent")
            elif len(line) > MAX_LINE_CHARACTERS:
                self._refuse(f"a message has at most {MAX_LINE_CHARACTERS} characters")
            elif line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._say(line)

    def note(self, text: str) -> None:
        """A remark, dim where it can be."""
        print(coloured(text, DIM, sys.stderr), file=sys.stderr, flush=True)

    def _read(self) -> str:
        if self.is_interactive and sys.stdout.isatty():
            return input("> ")
        if self.is_interactive:  # the answers go somewhere else: keep the prompt out of them
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline(MAX_LINE_CHARACTERS + 2)
        if not line:
            raise EOFError
        rest = line
        while rest and not rest.endswith("\n"):  # what is too long is refused as a whole
            rest = sys.stdin.readline(MAX_LINE_CHARACTERS)
        return line.removesuffix("\n").removesuffix("\r")

    def _command(self, line: str) -> None:
        match line.rstrip():
            case "/help":
                print("\n".join(f"{name:<9} {what}" for name, what in COMMANDS.items()))
                print("Ctrl-C    stop an answer", "a space before / sends it as text", sep="\n")
            case "/history":
                for message in self._history:
                    print(printable(f"{message.role}: {message.content}", sys.stdout))
                if not self._history:
                    self.note("nothing was said yet")
            case "/reset":
                self._history = list(self._system)
                self.note("the conversation is forgotten")
            case unknown:
                known = ", ".join(COMMANDS)
                self._refuse(f"{one_line(unknown):.80} is no command, and was not sent: {known}")

    def _say(self, text: str) -> None:
        """One message and its answer, or one line that says why there is none."""
        self._history.append(Message("user", text))
        answer, error = Answer(), None
        try:
            with self.interrupts.allowed():
                self._stream(answer)
        except (ServerError, ValueError) as raised:
            error = raised
        except KeyboardInterrupt:
            pass  # the answer tells: it is not finished
        if answer.texts:
            print(flush=True)
        if error is not None:
            self._failed(error, answer)
        elif answer.text or answer.finished:
            self._history.append(Message("assistant", answer.text))
            self.note(answer.describe())
        else:
            self._history.pop()
            self.note("stopped by Ctrl-C before any text: the message is out of the history")

    def _stream(self, answer: Answer) -> None:
        if self._is_lost:
            with contextlib.suppress(TimeoutError):
                self._client.wait_until_serving(RETURN_SECONDS)
            self._is_lost = False
        answer.sent_at = time.perf_counter()
        # Closing cancels the request on the server, however this is left.
        with closing(self._client.generate(self._history, **self._options)) as events:
            for event in events:
                text = answer.add(event)
                if text:
                    print(printable(text, sys.stdout), end="", flush=True)

    def _failed(self, error: ServerError | ValueError, answer: Answer) -> None:
        self._history.pop()
        cut = ", and what came of the answer," if answer.texts else ""
        end = f"the message{cut} is out of the history"
        if isinstance(error, ServerError) and error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            self._is_lost = True
            why = f"the server at {self._address} is not there ({error.message})"
            end += ": send it again when the server is back"
        else:
            why = error.message if isinstance(error, ServerError) else str(error)
            end += "; /reset forgets the conversation" if len(self._history) > 1 else ""
        self._refuse(f"{why}; {end}")

    def _refuse(self, why: str) -> None:
        self.num_failures += 1
        line = coloured(one_line(f"error: {why}"), RED, sys.stderr)
        print(line, file=sys.stderr, flush=True)


def coloured(text: str, colour: str, stream: TextIO) -> str:
    """``text`` in a colour, where ``stream`` is a terminal and nobody asked for none."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not stream.isatty() else f"{colour}{text}{PLAIN}"


def printable(text: str, stream: TextIO) -> str:
    """A model's text must not steer a terminal: control characters become U+FFFD there."""
    if not stream.isatty():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def one_line(text: str) -> str:
    """A server's words as one line without control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text).strip()


def is_text(line: str) -> bool:
    """Tells if all bytes of a line were characters; see ``prepare_input``."""
    return not any("\ud800" <= character <= "\udfff" for character in line)


def prepare_input() -> None:
    """No byte of a pipe ends the chat: what is no UTF-8 is refused with its line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
