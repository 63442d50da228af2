"""Calls of a service between their headers and their answer: how many, and for how long.

Knows no messages' contents and no model.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serving.loop import RequestRefusedError, TooManyRequestsError

# A client sends the message with the headers: few are on their way at once.
MAX_WAITING = 128


class MessageTimeoutError(Exception):
    """A call's message did not come in time."""


class Arrivals:
    """Counts calls, of which at most ``max_calls`` are in the server.

    A call's message has ``message_seconds`` to come. Only ``max_waiting`` wait for theirs: where
    there is one more, the oldest is given up, so that calls without a message shut nobody out.
    """

    def __init__(
        self, max_calls: int, message_seconds: float, max_waiting: int = MAX_WAITING
    ) -> None:
        self._max_calls = max_calls
        self._message_seconds = message_seconds
        self._max_waiting = max_waiting
        self.num_calls = 0
        self._waiting: dict[asyncio.Timeout, None] = {}  # the oldest first

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a call while it lasts; raises ``TooManyRequestsError`` for one too many."""
        if self.num_calls >= self._max_calls:
            raise TooManyRequestsError(
                f"{self.num_calls} calls are in progress, the limit is {self._max_calls}"
            )
        self.num_calls += 1
        try:
            yield
        finally:
            self.num_calls -= 1

    async def message(self, context: Any) -> bytes:
        """Returns the first message of a call.

        Raises ``RequestRefusedError`` for a call that has none, ``MessageTimeoutError``, and
        ``TooManyRequestsError`` where it is given up for newer calls.
        """
        self._give_up_the_oldest()
        timeout = asyncio.timeout(self._message_seconds)
        try:
            async with timeout:
                self._waiting[timeout] = None
                data = await context.read()
        except TimeoutError:
            if timeout in self._waiting:
                seconds = f"{self._message_seconds:g} s"
                raise MessageTimeoutError(f"the call's message did not come in {seconds}") from None
            raise TooManyRequestsError(
                f"the call's message did not come before {self._max_waiting} newer calls"
            ) from None
        finally:
            self._waiting.pop(timeout, None)
        if not isinstance(data, bytes):  # grpc.aio.EOF
            raise RequestRefusedError("the call has no message")
        return data

    def _give_up_the_oldest(self) -> None:
        while len(self._waiting) >= self._max_waiting:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            if not oldest.expired():
                oldest.reschedule(0.0)
