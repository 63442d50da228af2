"""Finds stop strings in a text that comes in pieces. Pure text: knows no tokens, no requests."""

from collections.abc import Sequence


class StopPatterns:
    """Stop strings made ready for the search; never changed, shared by the choices of a request.

    Takes time and memory linear in their characters. Raises ``ValueError`` for an empty one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string must have at least 1 character, got ''")
        self.stops = tuple(dict.fromkeys(stops))
        self.borders = tuple(map(_borders, self.stops))
        self.starting: dict[str, list[int]] = {}  # numbers of the stops, by first character
        for number, stop in enumerate(self.stops):
            self.starting.setdefault(stop[0], []).append(number)


class StopStrings:
    """Lets a text through up to the first stop string, whatever pieces it comes in.

    The stop string that is complete first ends the text; of several that end with the same
    character, the longest. (An earlier beginning that is not complete yet does not wait: that would
    cost tokens.) ``include`` keeps the stop string itself. What is held back is the longest end of
    the text that is a proper beginning of a stop string. Time is linear in the text.
    """

    def __init__(self, patterns: StopPatterns, include: bool = False) -> None:
        self._patterns = patterns
        self._include = include
        self._held = ""
        # By number of the stop: how many of its characters the text ends with, if any (Knuth,
        # Morris and Pratt); the largest of these is how much is held.
        self._lengths: dict[int, int] = {}

    @property
    def held(self) -> str:
        """The text that has come and is not let through yet."""
        return self._held

    def add(self, text: str, may_match: bool = True) -> tuple[str, str | None]:
        """Returns the text that is certain now, and the stop string that ended it.

        Nothing may be added after that. Without ``may_match`` no stop string is complete within
        this piece; one that begins here may be complete in a later one.
        """
        text, start = self._held + text, len(self._held)
        starting = self._patterns.starting
        for position in range(start, len(text)):
            if not self._lengths and text[position] not in starting:
                continue
            stop = self._advance(text[position], may_match)
            if stop is not None:
                self._held, self._lengths = "", {}
                end = position + 1
                return text[: end if self._include else end - len(stop)], stop
        safe = len(text) - max(self._lengths.values(), default=0)
        self._held = text[safe:]
        return text[:safe], None

    def finish(self) -> str:
        """Returns what was held back, as no more text will come."""
        held, self._held, self._lengths = self._held, "", {}
        return held

    def _advance(self, character: str, may_match: bool) -> str | None:
        """Notes one more character; returns the longest stop string that it completes."""
        stops, borders = self._patterns.stops, self._patterns.borders
        lengths: dict[int, int] = {}
        complete: str | None = None
        candidates = dict.fromkeys(self._patterns.starting.get(character, ()), 0) | self._lengths
        for number, length in candidates.items():
            stop = stops[number]
            while length and stop[length] != character:
                length = borders[number][length - 1]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                if may_match and (complete is None or length > len(complete)):
                    complete = stop
                length = borders[number][-1]
            if length:
                lengths[number] = length
        self._lengths = lengths
        return complete


def _borders(text: str) -> tuple[int, ...]:
    """For each beginning of the text: how long its longest proper end is that begins it too."""
    borders, length = [0], 0
    for character in text[1:]:
        while length and text[length] != character:
            length = borders[length - 1]
        length += text[length] == character
        borders.append(length)
    return tuple(borders)
