"""The outputs of one request, on their way from the engine's thread to the call that sends them.

Lives in asyncio: what the engine's thread makes arrives through ``call_soon_threadsafe``. Knows no
gRPC, no tokenizer, no engine.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import RequestOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextOutput:
    """An output of one choice, with its text.

    ``text`` is new and certain. ``held`` has come too, but may be the beginning of a stop string;
    it is owed to the client when the choice is aborted now. ``stop_string`` ended the choice: then
    ``output`` ends with the token that completed it.
    """

    output: RequestOutput
    text: str = ""
    held: str = ""
    stop_string: str | None = None


class RequestStream:
    """The outputs of one request, read by one asyncio task.

    A reader that is slow finds the outputs it missed merged into one for each choice: what is held
    never exceeds the request's own ``max_tokens`` tokens a choice, and nothing is lost. The first
    output read is one of choice 0; others wait for it, because it brings what holds for all.
    Leave it through ``EngineLoop.close``.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._first_token_at: dict[int, float] = {}
        self._last = [
            TextOutput(
                RequestOutput(
                    request_id=request.request_id,
                    token_ids=(),
                    choice=choice,
                    num_prompt_tokens=len(request.prompt_token_ids),
                )
            )
            for choice in range(request.n)
        ]
        self._running = set(range(request.n))
        self._unread: dict[int, _Unread] = {}  # the choice that has waited longest comes first
        self._is_started = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def outputs(self, whole: bool = False) -> AsyncIterator[TextOutput]:
        """All outputs, the last one of each choice with a ``finish_reason``.

        With ``whole`` there is one output a choice, when all have ended. Raises whatever ended the
        stream before its time; what came before is read first, unless ``whole``.
        """
        if whole:
            while self._running:
                await self._change()
            if self._error is not None:
                raise self._error
            for choice in range(self.request.n):
                yield self._unread.pop(choice).merged()
            return
        while self._unread or self._running or self._error is not None:
            yield await self.read()

    async def read(self) -> TextOutput:
        """Returns the news of one choice, waiting if there are none; errors as in ``outputs``."""
        while (choice := self._readable()) is None:
            if self._error is not None:
                raise self._error
            assert self._running, "nothing to read"
            await self._change()
        self._is_started = True
        return self._unread.pop(choice).merged()

    @property
    def is_finished(self) -> bool:
        """True when nothing more will come; what came may still have to be read."""
        return not self._running

    def first_token_at(self, choice: int) -> float | None:
        """Returns the ``time.monotonic()`` at which the first token of a choice arrived here."""
        return self._first_token_at.get(choice)

    # ------------------------------------------------------------------------ for the loop

    def put(self, output: TextOutput) -> None:
        """Adds an output; those of a choice that has ended are dropped."""
        choice = output.output.choice
        if choice not in self._running:
            return
        if output.output.token_ids and choice not in self._first_token_at:
            self._first_token_at[choice] = time.monotonic()
        if choice in self._unread:
            self._unread[choice].add(output)
        else:
            self._unread[choice] = _Unread(output)
        self._last[choice] = output
        if output.output.finish_reason is not None:
            self._running.remove(choice)
        self._changed.set()

    def abort(self) -> None:
        """Finishes every choice as aborted; late outputs of the engine are dropped."""
        for choice in tuple(self._running):
            last = self._last[choice]
            output = replace(
                last.output,
                token_ids=(),
                logprobs=(),
                prompt_logprobs=(),
                finish_reason=FinishReason.ABORT,
            )
            self.put(TextOutput(output, text=last.held))

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error, unless all choices have ended."""
        if self._running:
            self._error = error
            self._running.clear()
            self._changed.set()

    # --------------------------------------------------------------------------------------

    def _readable(self) -> int | None:
        if self._is_started:
            return next(iter(self._unread), None)
        return 0 if 0 in self._unread else None

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class _Unread:
    """Outputs of one choice since it was read last, merged into one."""

    def __init__(self, output: TextOutput) -> None:
        self._last = output
        self._is_merged = False
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._texts: list[str] = []
        self._prompt_logprobs = output.output.prompt_logprobs

    def add(self, output: TextOutput) -> None:
        if not self._is_merged:
            self._is_merged = True
            self._append(self._last)
        self._append(output)
        self._last = output

    def merged(self) -> TextOutput:
        if not self._is_merged:
            return self._last
        output = replace(
            self._last.output,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
        )
        return replace(self._last, output=output, text="".join(self._texts))

    def _append(self, output: TextOutput) -> None:
        self._token_ids.extend(output.output.token_ids)
        self._logprobs.extend(output.output.logprobs)
        if output.text:
            self._texts.append(output.text)
