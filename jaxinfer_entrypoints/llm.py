"""The front door from Python: a model in this process, with the client's options and events."""

import difflib
import time
import uuid
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Self, Unpack, cast, overload

import jax

from jaxinfer.engine import Engine
from jaxinfer_entrypoints.generation import Generation, Generations
from jaxinfer_entrypoints.loading.assembly import LoadedModel, PickShapes, load_model
from jaxinfer_entrypoints.loading.options import DEFAULT_MODEL, LoadKeywords, LoadOptions
from jaxinfer_entrypoints.loading.phases import Phases
from serving.client import Completion, Event, GenerateOptions, Message, Prompt
from serving.client.events import completions_of, event_of
from serving.client.requests import check_one_choice, generate_request
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.request_checks import check_request_id
from serving.request_stream import TextOutput
from serving.rpc import responses
from serving.rpc.admission import admitted_request, check_wishes, prompt_encoder
from serving.rpc.validate import text_options
from serving.served_model import ServedModel
from serving.text.output_text import output_texts

MAX_PROMPTS = 100_000
# Of a call to a server, and of no use here.
CALL_OPTIONS = ("timeout", "stream")


@dataclass
class _Answer:
    """The events of a request that nobody has taken yet."""

    generation: Generation
    added: float
    events: deque[Event] = field(default_factory=deque)
    early: list[TextOutput] = field(default_factory=list)  # before choice 0's first output
    is_started: bool = False
    first_tokens: dict[int, float] = field(default_factory=dict)


class LLM:
    """A model in this process: ``LLM("smollm2-135m-instruct").generate("The sea is").text``.

    Options of a call are those of ``serving.client.Client``, checked as a server checks them, and
    so are events and completions: code moves between the two unchanged. Many prompts, and streams
    that are open at the same time, share the steps of one engine. One thread may use it.

    ``with LLM(...) as llm:`` frees the devices' memory at the end, as ``close()`` does.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Unpack[LoadKeywords]) -> None:
        """Fetches, loads and compiles ``model``; ``options`` are the fields of ``LoadOptions``.

        Raises ``TypeError`` naming the nearest option for one that does not exist, ``ValueError``
        in one line for what cannot be, ``OSError`` for files that cannot be read.
        """
        for name in options:
            if name not in LoadKeywords.__annotations__:
                near = difflib.get_close_matches(name, LoadKeywords.__annotations__, 1, cutoff=0.0)
                raise TypeError(f"LLM has no option {name!r:.80}; the nearest is {near[0]!r}")
        self._open(load_model(_one_replica(LoadOptions(model, **options)), _silent()))

    @classmethod
    def load(
        cls,
        options: LoadOptions,
        phases: Phases | None = None,
        pick_shapes: PickShapes | None = None,
    ) -> Self:
        """Loads as ``options`` say; for ``phases`` and ``pick_shapes`` see ``load_model``."""
        llm = cls.__new__(cls)
        llm._open(load_model(_one_replica(options), phases or _silent(), pick_shapes))
        return llm

    def _open(self, loaded: LoadedModel) -> None:
        self._loaded: LoadedModel | None = loaded
        self._served = ServedModel(
            name=loaded.name,
            model=loaded.spec.model,
            engines=(),
            engine_config=loaded.spec.config,
            dtypes=loaded.spec.dtypes,
            tokenizer=loaded.tokenizer,
            default_sampling=loaded.default_sampling,
            default_ending=loaded.default_ending,
        )
        self._generations = Generations(loaded.engine)
        self._answers: dict[str, _Answer] = {}

    @property
    def loaded(self) -> LoadedModel:
        """The model with its engine, tokenizer and parameters. ``RuntimeError`` once closed."""
        self._check_open()
        assert self._loaded is not None
        return self._loaded

    @property
    def engine(self) -> Engine:
        """The engine that everything runs on."""
        return self.loaded.engine

    @property
    def generations(self) -> Generations:
        """Requests that run, for programs that make their own. ``RuntimeError`` once closed."""
        self._check_open()
        return self._generations

    @overload
    def generate(self, prompts: str, **options: Unpack[GenerateOptions]) -> Completion: ...

    @overload
    def generate(
        self, prompts: Sequence[int] | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: list[str]
        | tuple[str, ...]
        | Sequence[Sequence[int]]
        | Sequence[Sequence[Message]],
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], **options: Unpack[GenerateOptions]
    ) -> Completion | list[Completion]: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt], **options: Unpack[GenerateOptions]
    ) -> Completion | list[Completion]:
        """Returns the completion of one prompt, or of each of several, in their order.

        A prompt is a text, token ids, or a conversation of messages. All are checked before any
        runs: ``ValueError`` and ``TypeError`` name the prompt, the field, the value and the limit.
        """
        check_one_choice(options, "generate_choices")
        if not _is_several(prompts):
            return self.generate_choices(cast(Prompt, prompts), **options)[0]
        several = cast(Sequence[Prompt], prompts)
        if len(several) > MAX_PROMPTS:
            raise ValueError(f"there are {len(several)} prompts, more than {MAX_PROMPTS}")
        if "request_id" in options and len(several) > 1:
            raise ValueError(f"request_id {options['request_id']!r:.80} is for one prompt")
        made = []
        for number, prompt in enumerate(several):
            try:
                made.append(self._generation(prompt, options))
            except (TypeError, ValueError) as error:
                raise type(error)(f"prompt {number}: {error}") from error
        return [choices[0] for choices in self._completions(made)]

    def generate_choices(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> tuple[Completion, ...]:
        """Returns all ``n`` choices of one prompt."""
        return self._completions([self._generation(prompt, options)])[0]

    @overload
    def chat(
        self, messages: Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> Completion: ...

    @overload
    def chat(
        self, messages: Sequence[Sequence[Message]], **options: Unpack[GenerateOptions]
    ) -> list[Completion]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        **options: Unpack[GenerateOptions],
    ) -> Completion | list[Completion]:
        """Returns the answer to a conversation, or to each of several.

        Raises ``TypeError`` for anything but messages.
        """
        if isinstance(messages, Message) or not messages:
            raise TypeError(f"a conversation is a list of Message, got {messages!r:.80}")
        several = messages if _is_several(messages) else [messages]
        for conversation in cast(Sequence[Sequence[Message]], several):
            if isinstance(conversation, str) or not all(
                isinstance(message, Message) for message in conversation
            ):
                raise TypeError(f"a conversation is a list of Message, got {conversation!r:.80}")
        return self.generate(cast(Prompt, messages), **options)

    def stream(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> Generator[Event, None, None]:
        """Yields events as they come; leaving the loop early, or ``close()``, ends the request."""
        generation = self._generation(prompt, options)
        return self._events(generation)

    def close(self) -> None:
        """Frees the devices' memory; requests that run are lost. May be called again."""
        if self._loaded is not None:
            self._loaded.engine.close()
            for leaf in jax.tree.leaves((self._loaded.parameters, self._loaded.draft_parameters)):
                leaf.delete()
        self._loaded = None
        self._answers.clear()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generation(self, prompt: Prompt, options: GenerateOptions) -> Generation:
        """Makes a request of a prompt, checked as by a server; nothing runs yet."""
        self._check_open()
        for name in CALL_OPTIONS:
            if options.get(name) is not None:
                raise ValueError(f"{name} is for calls of a server, got {options.get(name)!r:.80}")
        message = generate_request(prompt, options)
        request_id = message.request_id if message.HasField("request_id") else uuid.uuid4().hex
        check_request_id(request_id)
        sampling = check_wishes(message, self._served)
        max_model_len = self._served.engine_config.max_model_len
        encode, _ = prompt_encoder(message, self._served.tokenizer.limited(max_model_len))
        request = admitted_request(message, request_id, encode(), sampling, self._served)
        return Generation.of(
            request,
            output_texts(
                self._served.tokenizer,
                text_options(message.sampling, self._served.default_ending),
            ),
        )

    def _check_open(self) -> None:
        if self._loaded is None:
            raise RuntimeError("this LLM is closed: make a new one")

    def _completions(self, made: Sequence[Generation]) -> list[tuple[Completion, ...]]:
        """Runs all at once; what runs is ended when one fails."""
        answers: list[_Answer] = []
        try:
            answers.extend(self._start(generation) for generation in made)
            return [completions_of(self._drain(answer)) for answer in answers]
        finally:
            for answer in answers:
                self._forget(answer)

    def _events(self, generation: Generation) -> Generator[Event, None, None]:
        answer = self._start(generation)
        try:
            yield from self._drain(answer)
        finally:
            self._forget(answer)

    def _start(self, generation: Generation) -> _Answer:
        self._generations.add(generation)
        answer = _Answer(generation, time.monotonic())
        self._answers[generation.request.request_id] = answer
        return answer

    def _forget(self, answer: _Answer) -> None:
        if self._answers.pop(answer.generation.request.request_id, None) and self._loaded:
            self._generations.abort(answer.generation)

    def _drain(self, answer: _Answer) -> Generator[Event, None, None]:
        """Yields the events of one request; the engine's steps serve all others too."""
        while answer.events or not answer.generation.is_finished:
            self._check_open()
            if answer.events:
                yield answer.events.popleft()
                continue
            for generation, told in self._generations.step():
                other = self._answers.get(generation.request.request_id)
                if other is not None:
                    self._note(other, told)

    def _note(self, answer: _Answer, told: TextOutput) -> None:
        """Turns an output into events, the first of choice 0: it brings what holds for all."""
        request, tokenizer = answer.generation.request, self._served.tokenizer
        if not answer.is_started:
            if told.output.choice:
                answer.early.append(told)
                return
            answer.is_started = True
            answer.events.append(event_of(responses.started(request, told.output, tokenizer)))
            early, answer.early = answer.early, []
        else:
            early = []
        for each in (told, *early):
            output, seconds = each.output, time.monotonic() - answer.added
            if output.token_ids:
                answer.first_tokens.setdefault(output.choice, seconds)
            if output.token_ids or each.text:
                answer.events.append(event_of(responses.delta(each, tokenizer)))
            if output.finish_reason is not None:
                timings = pb.Timings(
                    queue_seconds=output.queue_seconds,
                    time_to_first_token_seconds=answer.first_tokens.get(output.choice),
                    total_seconds=seconds,
                )
                answer.events.append(event_of(responses.finished(each, timings)))


def _silent() -> Phases:
    return Phases(time.perf_counter(), quiet=True)


def _one_replica(options: LoadOptions) -> LoadOptions:
    if options.compile_only:
        raise ValueError("compile_only loads nothing: use serve.py --compile-only")
    if options.data_parallel != 1:
        raise ValueError(f"data_parallel must be 1 for LLM, got {options.data_parallel}")
    return options


def _is_several(prompts: object) -> bool:
    """Tells several prompts from one: a sequence of texts or of sequences, an empty one too."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        return False
    return all(
        isinstance(item, str) or (isinstance(item, Sequence) and not isinstance(item, bytes))
        for item in prompts
    )
