"""From the tokens of one choice to its text: characters made whole, stop strings found.

Knows no threads and no gRPC.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxinfer.request import LIMITS, FinishReason
from jaxinfer.schedule import RequestOutput
from serving.request_stream import TextOutput
from serving.text.stop_strings import StopPatterns, StopStrings
from serving.text.tokenizer import Detokenizer, TokenBytes


@dataclass(frozen=True)
class TextOptions:
    """Wishes of a request for its text; the fields of the same names in the .proto."""

    stop: tuple[str, ...] = ()
    include_stop_in_output: bool = False
    skip_control_tokens: bool = True
    min_tokens: int = 0


def check_stop(stops: Sequence[str]) -> None:
    """Raises ``ValueError`` for too many stop strings, and for one too short or too long."""
    LIMITS["num_stop"].check("number of stop", len(stops))
    for i, stop in enumerate(stops):
        LIMITS["stop_characters"].check(f"characters of stop[{i}]", len(stop))


class OutputText:
    """The text of one choice. Outputs go in as the engine gives them, until one has ended it.

    The token that ended a choice has text only with ``include_stop_in_output``. A stop string is
    completed only by tokens behind the first ``min_tokens``.
    """

    def __init__(
        self, tokenizer: TokenBytes, options: TextOptions, patterns: StopPatterns | None
    ) -> None:
        self._options = options
        self._detokenizer = Detokenizer(tokenizer, options.skip_control_tokens)
        self._stops = None
        if patterns is not None:
            self._stops = StopStrings(patterns, options.include_stop_in_output)
        self._num_tokens = 0

    def add(self, output: RequestOutput) -> TextOutput:
        """The output with its text; cut, and finished, where a stop string is complete.

        Time is linear in the new tokens. Raises ``ValueError`` for tokens that have no text.
        """
        token_ids = output.token_ids
        if output.finish_reason is FinishReason.STOP and not self._options.include_stop_in_output:
            token_ids = token_ids[:-1]
        is_last = output.finish_reason is not None
        if self._stops is None:
            text = self._detokenizer.add(token_ids)
            return TextOutput(output, text + self._detokenizer.finish() if is_last else text)
        texts = []
        for number, token_id in enumerate(token_ids):
            text, stop = self._add_piece(self._stops, self._detokenizer.add((token_id,)), 1)
            texts.append(text)
            if stop is not None:
                return _stopped(output, number + 1, "".join(texts), stop)
        if not is_last:
            return TextOutput(output, "".join(texts), self._stops.held)
        # A character that is not complete becomes one now.
        text, stop = self._add_piece(self._stops, self._detokenizer.finish(), 0)
        texts.append(text)
        if stop is not None:
            return _stopped(output, len(output.token_ids), "".join(texts), stop)
        return TextOutput(output, "".join(texts) + self._stops.finish())

    def _add_piece(self, stops: StopStrings, text: str, num_tokens: int) -> tuple[str, str | None]:
        self._num_tokens += num_tokens
        if not text:
            return "", None
        return stops.add(text, may_match=self._num_tokens > self._options.min_tokens)


def output_texts(tokenizer: TokenBytes, options: TextOptions) -> Callable[[], OutputText]:
    """A function that makes the text of one more choice. Raises ``ValueError`` for empty stops."""
    patterns = StopPatterns(options.stop) if options.stop else None
    return lambda: OutputText(tokenizer, options, patterns)


def _stopped(output: RequestOutput, num_tokens: int, text: str, stop: str) -> TextOutput:
    """The output up to the token that completed a stop string."""
    num_dropped = len(output.token_ids) - num_tokens
    stopped = replace(
        output,
        token_ids=output.token_ids[:num_tokens],
        logprobs=output.logprobs[:num_tokens],
        finish_reason=FinishReason.STOP,
        num_output_tokens=output.num_output_tokens - num_dropped,
    )
    return TextOutput(stopped, text, stop_string=stop)
