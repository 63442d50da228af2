"""Requests on an engine in this process: from its outputs to the text of each choice."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxinfer.engine import Engine
from jaxinfer.request import Request
from serving.request_stream import TextOutput
from serving.text.output_text import OutputText


@dataclass
class Generation:
    """One request on its way through the engine, with the text of each of its choices."""

    request: Request
    texts: list[OutputText]
    running: set[int] = field(default_factory=set)

    @staticmethod
    def of(request: Request, new_text: Callable[[], OutputText]) -> "Generation":
        """Makes a generation of which nothing has run."""
        return Generation(request, [new_text() for _ in range(request.n)], {*range(request.n)})

    @property
    def is_finished(self) -> bool:
        """True once every choice has ended."""
        return not self.running


class Generations:
    """The generations that run on an engine. Not thread-safe, as the engine is not."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._live: dict[str, Generation] = {}

    def add(self, generation: Generation) -> None:
        """Queues a request. Raises ``ValueError`` for one that can never run, or runs already."""
        request_id = generation.request.request_id
        if request_id in self._live:
            raise ValueError(f"request_id {request_id!r} is in use")
        self._engine.add(generation.request)
        self._live[request_id] = generation

    def abort(self, generation: Generation) -> None:
        """Ends a generation that nobody waits for any more; harmless when it has ended."""
        if self._live.pop(generation.request.request_id, None) is not None:
            self._engine.abort(generation.request.request_id)

    @property
    def has_unfinished(self) -> bool:
        """True while a step would have something to do."""
        return self._engine.has_unfinished

    def step(self) -> list[tuple[Generation, TextOutput]]:
        """Runs the engine on; returns what is new, [] being no sign of the end.

        A stop string ends its choice in the engine too; what comes late for it is dropped.
        """
        news = []
        for output in self._engine.step():
            generation = self._live.get(output.request_id)
            if generation is None or output.choice not in generation.running:
                continue
            told = generation.texts[output.choice].add(output)
            if told.output.finish_reason is not None:
                generation.running.discard(output.choice)
                if output.finish_reason is None:
                    self._engine.abort(output.request_id, output.choice)
            if generation.is_finished:
                del self._live[output.request_id]
            news.append((generation, told))
        return news
