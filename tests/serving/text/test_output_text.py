"""From tokens to text: incomplete characters, stop strings, what ends and what is left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.request import FinishReason
from jaxinfer.schedule import RequestOutput
from serving.request_stream import TextOutput
from serving.text.output_text import OutputText, TextOptions, output_texts
from tests.serving.fakes import EOS, ByteTokenizer, expected_logprobs

TOKENIZER = ByteTokenizer()


def new_text(
    *stop: str, include: bool = False, skip: bool = True, min_tokens: int = 0
) -> OutputText:
    return output_texts(TOKENIZER, TextOptions(stop, include, skip, min_tokens))()


def outputs(
    token_ids: list[int], sizes: list[int], reason: FinishReason = FinishReason.LENGTH
) -> list[RequestOutput]:
    """Returns outputs of so many tokens each, as an engine makes them; the last has the reason."""
    told, start = [], 0
    sizes = [*sizes, len(token_ids)]
    while start < len(token_ids):
        end = min(start + sizes.pop(0), len(token_ids))
        told.append(
            RequestOutput(
                request_id="r",
                token_ids=tuple(token_ids[start:end]),
                finish_reason=reason if end == len(token_ids) else None,
                logprobs=tuple(x for i in range(start, end) for x in expected_logprobs(1, i, 0)),
                num_output_tokens=end,
            )
        )
        start = end
    return told


def feed(text: OutputText, told: list[RequestOutput]) -> list[TextOutput]:
    """Adds outputs until one is the last; returns those with text."""
    results = []
    for output in told:
        results.append(text.add(output))
        if results[-1].output.finish_reason is not None:
            break
    return results


def expected(token_ids: list[int], stops: list[str], min_tokens: int) -> tuple[str, str, int]:
    """Text, stop string or "", number of tokens; by decoding every beginning of the tokens.

    A character that will never be complete counts when that is known: at the next token that
    does not belong to it, or at the end.
    """
    for num_tokens in range(1, len(token_ids) + 1):
        data = bytes(token_ids[:num_tokens])
        text = data.decode(errors="replace")
        if num_tokens < len(token_ids):
            text = without_incomplete_end(data)
        before = without_incomplete_end(bytes(token_ids[: num_tokens - 1]))
        if num_tokens <= min_tokens:
            continue
        for end in range(len(before) + 1, len(text) + 1):
            found = [stop for stop in stops if text[:end].endswith(stop)]
            if found:
                stop = max(found, key=len)
                return text[: end - len(stop)], stop, num_tokens
    return bytes(token_ids).decode(errors="replace"), "", len(token_ids)


def without_incomplete_end(data: bytes) -> str:
    for held in range(4):
        whole = data[: len(data) - held].decode(errors="replace")
        # An end that more bytes can turn into something else is not certain.
        if all((data + more).decode(errors="replace").startswith(whole) for more in CONTINUATIONS):
            return whole
    raise AssertionError


# Enough to complete any beginning of a character of CHARACTERS, or to break it off.
CHARACTERS = "aé€😀"
CONTINUATIONS = [
    *(c.encode()[i:] for c in CHARACTERS for i in range(len(c.encode()))),
    *(b"", b"\xff"),
]
BYTES = sorted({byte for c in CHARACTERS for byte in c.encode()})


@given(
    token_ids=st.text(CHARACTERS, min_size=1, max_size=20).map(lambda text: list(text.encode()))
    | st.lists(st.sampled_from(BYTES), min_size=1, max_size=20),
    stops=st.lists(st.text(CHARACTERS + "\ufffd", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 6), max_size=20),
    min_tokens=st.just(0) | st.integers(0, 12),
)
def test_stop_strings_are_found_whatever_the_tokens_are(
    token_ids: list[int], stops: list[str], sizes: list[int], min_tokens: int
) -> None:
    told = feed(new_text(*stops, min_tokens=min_tokens), outputs(token_ids, sizes))
    text = "".join(output.text for output in told)
    kept = [token_id for output in told for token_id in output.output.token_ids]
    last = told[-1]
    want_text, want_stop, want_tokens = expected(token_ids, stops, min_tokens)
    assert (text, last.stop_string or "", len(kept)) == (want_text, want_stop, want_tokens)
    assert kept == token_ids[:want_tokens]
    assert last.output.num_output_tokens == want_tokens
    logprobs = [entry for output in told for entry in output.output.logprobs]
    assert [entry.logprob for entry in logprobs] == [-0.5 * i for i in range(want_tokens)]
    reason = FinishReason.STOP if want_stop else FinishReason.LENGTH
    assert last.output.finish_reason is reason


def test_what_is_held_is_told_with_every_output() -> None:
    told = feed(new_text("ab!"), outputs(list(b"xabab"), [1, 1, 1, 1, 1]))
    assert [output.text for output in told] == ["x", "", "", "ab", "ab"]
    assert [output.held for output in told] == ["", "a", "ab", "a", ""]


def test_the_stop_string_can_be_a_part_of_the_text() -> None:
    for include, text in ((False, "x"), (True, "xab")):
        told = feed(new_text("ab", include=include), outputs(list(b"xabcd"), [1, 4]))
        assert "".join(output.text for output in told) == text
        assert [output.output.token_ids for output in told] == [(120,), (97, 98)]
        assert told[-1].output.num_output_tokens == 3
        assert told[-1].stop_string == "ab"


@pytest.mark.parametrize(
    ("last", "include", "skip", "text"),
    [
        (ord("!"), False, True, "ab"),
        (ord("!"), True, True, "ab!"),
        (EOS, False, True, "ab"),
        (EOS, True, True, "ab"),
        (EOS, False, False, "ab"),
        (EOS, True, False, "ab<257>"),
    ],
)
@pytest.mark.parametrize("stop", [(), ("zz",), ("!!",)])
def test_the_token_that_ends_has_text_only_when_asked_for(
    last: int, include: bool, skip: bool, text: str, stop: tuple[str, ...]
) -> None:
    for sizes in ([], [1, 1, 1]):
        told = feed(
            new_text(*stop, include=include, skip=skip),
            outputs([*b"ab", last], sizes, FinishReason.STOP),
        )
        assert "".join(output.text for output in told) == text
        assert told[-1].output.token_ids[-1] == last
        assert told[-1].stop_string is None


def test_control_tokens_inside_the_text() -> None:
    for skip, text in ((True, "ab"), (False, "a<256>b")):
        told = feed(new_text(skip=skip), outputs([97, 256, 98], [1]))
        assert "".join(output.text for output in told) == text


def test_a_stop_string_completed_by_a_character_that_never_is() -> None:
    told = feed(new_text("a\ufffd"), outputs([*b"xa", 0xE2], [1, 1, 1]))
    assert "".join(output.text for output in told) == "x"
    assert (told[-1].output.finish_reason, told[-1].stop_string) == (FinishReason.STOP, "a\ufffd")
