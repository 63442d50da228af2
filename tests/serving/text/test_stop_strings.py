"""Stop strings against a plain definition, however the text is split."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.text.stop_strings import StopPatterns, StopStrings
from tests.patience import WORK_SECONDS


def expected(text: str, stops: list[str], include: bool, may_match_from: int) -> tuple[str, str]:
    """The text that is let through, and the stop string or ""; by looking at every beginning."""
    for end in range(may_match_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, ""


def held_at_most(text: str, stops: list[str]) -> int:
    """The longest end of the text that is a proper beginning of a stop string."""
    beginnings = [stop[:length] for stop in stops for length in range(len(stop))]
    return max(len(beginning) for beginning in beginnings if text.endswith(beginning))


def texts(alphabet: str, max_size: int) -> st.SearchStrategy[str]:
    return st.text(alphabet, max_size=max_size)


@settings(max_examples=400)
@given(
    data=st.data(),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
    text=texts("abc", 60) | texts("ab", 30),
    include=st.booleans(),
)
def test_any_split_gives_what_the_definition_says(
    data: st.DataObject, stops: list[str], text: str, include: bool
) -> None:
    matcher = StopStrings(StopPatterns(stops), include)
    may_match_from = data.draw(st.just(0) | st.integers(0, len(text)), label="may match from")
    emitted, stop, start = "", None, 0
    while start < len(text) and stop is None:
        end = start + data.draw(st.integers(0, 7))
        if start < may_match_from:
            end = min(end, may_match_from)
        safe, stop = matcher.add(text[start:end], may_match=start >= may_match_from)
        emitted += safe
        start = end
        if stop is None:
            assert emitted + matcher.held == text[:end]
            assert len(matcher.held) == held_at_most(text[:end], stops)
    assert matcher.held == "" or stop is None
    emitted += matcher.finish()
    assert (emitted, stop or "") == expected(text, stops, include, may_match_from)
    assert matcher.finish() == ""


@pytest.mark.parametrize(
    ("stops", "pieces", "let_through", "stop"),
    [
        # The one that is complete first wins, not the one that began first.
        (["abcd", "bc"], ["xabcd"], "xa", "bc"),
        # Of those that end together the longest; the order does not matter.
        (["bc", "abc"], ["x", "ab", "c"], "x", "abc"),
        (["aab"], ["aa", "aa", "b"], "aa", "aab"),
        (["\n\n"], ["a\n", "b", "\n", "\nc"], "a\nb", "\n\n"),
        (["é€"], ["é", "é", "€"], "é", "é€"),
        (["x", "x"], ["yx"], "y", "x"),
        (["abc"], ["ab"], "ab", None),
    ],
)
def test_examples(stops: list[str], pieces: list[str], let_through: str, stop: str | None) -> None:
    matcher, emitted, found = StopStrings(StopPatterns(stops)), "", None
    for piece in pieces:
        safe, found = matcher.add(piece)
        emitted += safe
    assert (emitted + matcher.finish(), found) == (let_through, stop)


def test_text_that_is_not_yet_allowed_to_match_can_begin_a_match() -> None:
    matcher = StopStrings(StopPatterns(["ab", "abab"]))
    assert matcher.add("xab", may_match=False) == ("x", None)
    assert matcher.add("a") == ("", None)
    assert matcher.add("b") == ("", "abab")
    # The end of one that did not match can begin the next.
    matcher = StopStrings(StopPatterns(["aba"]))
    assert matcher.add("xaba", may_match=False) == ("xab", None)
    assert matcher.add("ba") == ("", "aba")
    matcher = StopStrings(StopPatterns(["ab"]))
    # What can be no beginning of anything any more is not held.
    assert matcher.add("xab", may_match=False) == ("xab", None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 character"):
        StopPatterns(["a", ""])


def test_choices_share_patterns_but_nothing_else() -> None:
    patterns = StopPatterns(["ab"])
    first, second = StopStrings(patterns), StopStrings(patterns)
    assert first.add("a") == ("", None)
    assert second.add("b") == ("b", None)
    assert first.add("b") == ("", "ab")


def test_time_is_linear_in_the_text() -> None:
    # The worst kind: every end of the text is a long beginning of every stop string.
    stops = ["a" * (255 - i) + "b" for i in range(16)]
    matcher = StopStrings(StopPatterns(stops))
    started = time.thread_time()
    for _ in range(4000):
        matcher.add("a")
    # About 3 us a character and stop string; looking at every beginning would take minutes.
    assert time.thread_time() - started < WORK_SECONDS
    assert matcher.held == "a" * 255
