"""scripts/chat.py against a real server with a fake engine: in this process, and as a process."""

import io
import re
import threading
from collections.abc import Callable, Iterator

import pytest

from jaxinfer_entrypoints import chat
from jaxinfer_entrypoints.command_line import chat as chat_options
from serving.client import Client, ServerError
from serving.client.events import Delta, Event
from tests.jaxinfer_entrypoints.chat_process import Process, chatting, server_on, wait_until
from tests.jaxinfer_entrypoints.conftest import Result
from tests.patience import HANG_SECONDS
from tests.serving.client.test_client import server_in_thread
from tests.serving.fakes import (
    MAX_MODEL_LEN,
    NUM_PAGES,
    ByteTokenizer,
    FakeEngine,
    expected_text,
)

STATS = re.compile(
    r"(\d+) tokens, ([\d.]+ tokens/s, )?TTFT \d+ ms, prompt (\d+) tokens, (\d+) cached, (.*)"
)

Chat = Callable[..., Result]


@pytest.fixture
def chat_with(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """``chat_with(address, lines, *flags)`` in this process, as from a pipe."""

    def run(address: str, lines: str, *flags: str) -> Result:
        monkeypatch.setattr("sys.argv", ["chat", "--address", address, *flags])
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        error = ""
        try:
            chat.main()
        except SystemExit as exit_:
            error = str(exit_.code)
        out, err = capsys.readouterr()
        return Result(out, err, error)

    return run


def prompt_of(*turns: tuple[str, str]) -> list[int]:
    """Returns what the fake template makes of a conversation."""
    return ByteTokenizer().encode_chat([{"role": r, "content": c} for r, c in turns])


def test_the_whole_conversation_is_sent(chat_with: Chat) -> None:
    engine = FakeEngine(num_cached_tokens=3)
    with server_in_thread(engine) as address:
        flags = ("--max-tokens", "5", "--system", "be kind")
        result = chat_with(address, "one\n\ntwo\r\n/reset\nthree", *flags)
    assert result.error == ""
    system = ("system", "be kind")
    first = prompt_of(system, ("user", "one"))
    answer = expected_text(first, 5)
    second = prompt_of(system, ("user", "one"), ("assistant", answer), ("user", "two"))
    third = prompt_of(system, ("user", "three"))
    prompts = [first, second, third]
    assert [list(request.prompt_token_ids) for request in engine.requests] == prompts
    assert result.stdout.splitlines() == [expected_text(prompt, 5) for prompt in prompts]
    notes = result.stderr.splitlines()
    assert notes.pop(2) == "the conversation is forgotten"
    matches = [STATS.fullmatch(note) for note in notes]
    assert [m and m.group(1, 3, 4, 5) for m in matches] == [
        ("5", str(len(prompt)), "3", "length") for prompt in prompts
    ]


def test_flags_become_the_request(chat_with: Chat) -> None:
    engine = FakeEngine()
    flags = "--temperature 0.5 --top-k 3 --seed 0 --stop zz --stop ?? --logit-bias 7=-2 --min-p 0.1"
    flags += " --stop-token-id 9 --min-tokens 2 --max-tokens 3 --ignore-eos --top-p 0.5"
    flags += " --repetition-penalty 1.5 --presence-penalty 0.5 --frequency-penalty 0.25"
    with server_in_thread(engine) as address:
        assert chat_with(address, "x\n", *flags.split()).error == ""
        assert chat_with(address, "x\n").error == ""
    request, default = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, 0)
    assert (sampling.top_p, sampling.min_p, sampling.logit_bias) == (0.5, 0.1, ((7, -2.0),))
    assert sampling.repetition_penalty == 1.5
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, 0.25)
    assert (request.stop_token_ids, request.min_tokens, request.max_tokens) == ((9,), 2, 3)
    assert request.ignore_eos
    assert default.max_tokens == 256
    assert default.sampling.temperature == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "2"], "--n: a chat has one answer, as text; got '2'"),
        (["--logprobs", "0"], "--logprobs: a chat has one answer"),
        (["--address", "nowhere"], "must be HOST:PORT with a port between 1 and 65535, got 'now"),
        (["--address", "a:65536"], "between 1 and 65535, got 'a:65536'"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--min-tokens", "9", "--max-tokens", "3"], "--min-tokens 9 is more than --max-tokens 3"),
        (["--temperature", "-1"], "temperature must be"),
        (["--stop", ""], "stop[0]"),
        (["--stop-token-id", "-1"], "stop_token_ids: Value out of range: -1"),
        (["--system", "\ud83d"], "message 0 of the prompt is not valid Unicode"),
    ],
)
def test_wrong_flags(chat_with: Chat, flags: list[str], message: str) -> None:
    result = chat_with("127.0.0.1:1", "", *flags)
    assert message in result.stderr + result.error
    assert result.error not in ("", "0")


def test_the_address_is_where_the_server_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxinfer_entrypoints.serve import parse_arguments

    monkeypatch.setattr("sys.argv", ["program"])
    served = parse_arguments()
    assert chat_options.parse_arguments().address == f"{served.host}:{served.port}"


def test_nobody_there(chat_with: Chat) -> None:
    result = chat_with("127.0.0.1:1", "hello\n")
    assert result.error.startswith("error: nothing answers at 127.0.0.1:1: start a server with ")
    assert "\n" not in result.error
    assert result.stdout == ""


def test_commands(chat_with: Chat) -> None:
    engine = FakeEngine()
    with server_in_thread(engine) as address:
        lines = "/help\n/history\nx\n/history \n/quite\n/reset now\n /quit\n/quit\nunheard\n"
        result = chat_with(address, lines, "--max-tokens", "2")
    sent = [bytes(request.prompt_token_ids[1:]) for request in engine.requests]
    assert len(sent) == 2
    assert b" /quit" in sent[1]
    answer = expected_text([256, *sent[0]], 2)
    assert f"user: x\nassistant: {answer}\n" in result.stdout
    assert all(name in result.stdout for name in chat.COMMANDS)
    assert "nothing was said yet" in result.stderr
    assert "error: /quite is no command, and was not sent: /reset, /history" in result.stderr
    assert "error: /reset now is no command" in result.stderr
    assert result.error == "error: 2 of the lines were not answered"


def test_a_conversation_that_outgrows_the_model(chat_with: Chat) -> None:
    """The refused message is taken back, so a shorter one fits."""
    engine = FakeEngine()
    with server_in_thread(engine) as address:
        too_long = "y" * MAX_MODEL_LEN
        result = chat_with(address, f"x\n{too_long}\nz\n/history\n", "--max-tokens", "2")
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert f"({MAX_MODEL_LEN})" in error
    assert error.endswith("the message is out of the history; /reset forgets the conversation")
    assert len(engine.requests) == 2
    assert too_long not in result.stdout
    assert "user: z" in result.stdout
    assert result.error == "error: 1 of the lines were not answered"


def test_hostile_lines(chat_with: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_LINE_CHARACTERS", 10)
    engine = FakeEngine()
    with server_in_thread(engine) as address:
        lines = "a" * 11 + "\n" + "b" * 50 + "\n" + "c" * 10 + "\n\ud83d\n"
        result = chat_with(address, lines, "--max-tokens", "1")
    (request,) = engine.requests
    assert list(request.prompt_token_ids) == prompt_of(("user", "c" * 10))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert errors[:2] == ["error: a message has at most 10 characters"] * 2
    assert errors[2:] == ["error: this line is not UTF-8, and was not sent"]


def test_more_tokens_than_there_is_room_for(chat_with: Chat) -> None:
    engine = FakeEngine()
    with server_in_thread(engine) as address:
        result = chat_with(address, "hello\n", "--max-tokens", "999999")
    assert result.error.startswith("error: --max-tokens 999999 leaves no room for a message")
    assert not engine.requests


def test_a_model_does_not_steer_the_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "a\x1b[2J\tb\n\x9b\r\x07ä"
    assert chat.printable(text, Terminal()) == "a\ufffd[2J\tb\n\ufffd\ufffd\ufffdä"
    assert chat.printable(text, io.StringIO()) == text


def test_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert chat.coloured("a", chat.DIM, Terminal()) == "\x1b[2ma\x1b[0m"
    assert chat.coloured("a", chat.DIM, io.StringIO()) == "a"
    monkeypatch.setenv("NO_COLOR", "1")
    assert chat.coloured("a", chat.DIM, Terminal()) == "a"


def test_rates_count_what_came_after_the_first_delta() -> None:
    answer = chat.Answer(sent_at=1.0, num_tokens=9, num_first_tokens=4, first_at=1.5, last_at=2.0)
    assert answer.describe().startswith("9 tokens, 10.0 tokens/s, TTFT 500 ms, stopped by Ctrl-C")


# --------------------------------------------------------------------------- as a process


def test_interrupting_an_answer_in_a_terminal() -> None:
    engine = FakeEngine(step_seconds=0.005)
    with server_in_thread(engine) as address, chatting(address, terminal=True) as process:
        at = process.expect(r"fake at .* /help lists the commands")
        at = process.expect("> ", at)
        at = process.interrupt_prompt("/quit or Ctrl-D leaves", at)
        at = process.expect("> ", at)
        process.send("hello\n")
        at = process.expect("[a-z]{10}", process.expect("hello", at))
        process.interrupt()
        stopped = r"\x1b\[2m\d+ tokens, .*stopped by Ctrl-C: what came stays in the history\x1b\[0m"
        at = process.expect(stopped, at)
        wait_until(lambda: engine.stats.num_free_pages == NUM_PAGES)
        assert len(engine.aborted) == 1
        # The chat goes on, with the part of the answer that came.
        at = process.expect("> ", at)
        process.send("/history\n")
        at = process.expect(r"user: hello\r\nassistant: [a-z]{10,}\r\n", at)
        process.send("again\n")
        wait_until(lambda: len(engine.requests) == 2)
        process.interrupt()
        at = process.expect("stopped by Ctrl-C", at)
        at = process.expect("> ", at)
        process.send("\x04")  # Ctrl-D
        assert process.process.wait(timeout=HANG_SECONDS) == 0
        wait_until(lambda: engine.stats.num_free_pages == NUM_PAGES)
    prompt = bytes(engine.requests[1].prompt_token_ids[1:]).decode()
    assert re.fullmatch(r"\[user\]hello\[assistant\][a-z]{10,}\[user\]again\$\[a\]", prompt)


def test_interrupting_before_any_text() -> None:
    """And from a pipe: there the message is taken back, and the next one is answered."""
    engine = FakeEngine()
    engine.gate.clear()
    with server_in_thread(engine) as address, chatting(address, "--max-tokens", "3") as process:
        process.send("hello\nagain\n")
        process.close_input()
        wait_until(lambda: len(engine.requests) == 1)
        process.interrupt()
        process.expect("stopped by Ctrl-C before any text: the message is out of the history")
        engine.gate.set()
        assert process.process.wait(timeout=HANG_SECONDS) == 0
        wait_until(lambda: engine.stats.num_free_pages == NUM_PAGES)
    assert list(engine.requests[1].prompt_token_ids) == prompt_of(("user", "again"))


def test_a_lost_server_is_one_line_and_may_come_back() -> None:
    with server_in_thread(FakeEngine()) as address:
        process = Process(address, "--max-tokens", "3")
        try:
            process.send("one\n")
            at = process.expect(r"tokens, .*length\n")
        except BaseException:
            process.end()
            raise
    try:
        process.send("two\n")
        lost = rf"error: the server at {address} is not there .*: send it again when .* back\n"
        at = process.expect(lost, at)
        engine = FakeEngine()
        with server_on(int(address.rpartition(":")[2]), engine):
            process.send("three\n")
            process.expect(r"tokens, .*length\n", at)
            process.close_input()
            assert process.process.wait(timeout=HANG_SECONDS) == 1
        prompt = bytes(engine.requests[0].prompt_token_ids[1:])
        assert b"one" in prompt
        assert b"two" not in prompt
        assert b"three" in prompt
    finally:
        process.end()
    assert process.output.endswith("error: 1 of the lines were not answered\n")


def test_a_server_that_aborts_says_so(chat_with: Chat) -> None:
    engine = FakeEngine(step_seconds=0.002)
    with server_in_thread(engine) as address:
        ids: list[str] = []

        def abort() -> None:
            wait_until(lambda: engine.stats.num_running and engine.num_steps > 20)
            ids.append(engine.requests[0].request_id)
            with Client(address) as client:
                assert client.abort(ids[0])

        thread = threading.Thread(target=abort)
        thread.start()
        result = chat_with(address, "x\n/history\n", "--max-tokens", "400")
        thread.join(timeout=HANG_SECONDS)
    assert "aborted by the server: what came stays in the history" in result.stderr
    assert re.search(r"user: x\nassistant: [a-z]+\n", result.stdout)


def test_an_answer_that_breaks_off(chat_with: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer so far ends its line; neither it nor the message stays."""

    def broken(*_: object, **__: object) -> Iterator[Event]:
        yield Delta(0, "begun", (1, 2))
        raise ServerError("INTERNAL", "internal\n\x1b[31merror")

    engine = FakeEngine()
    with server_in_thread(engine) as address:
        monkeypatch.setattr(chat.Client, "generate", broken)
        result = chat_with(address, "x\n/history\n")
    assert result.stdout == "begun\n"
    assert result.stderr.splitlines() == [
        "error: internal [31merror; the message, and what came of the answer, is out of the "
        "history",
        "nothing was said yet",
    ]
