"""An engine and a tokenizer without a model: deterministic tokens, counted pages, any failure."""

import threading
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import EngineStats, RequestOutput, TokenLogprobs
from serving.served_model import ServedModel
from tests.patience import HANG_SECONDS

EOS = 257
VOCAB_SIZE = 258
MAX_MODEL_LEN = 512
PAGE_SIZE = 16
NUM_PAGES = 64


class ByteTokenizer:
    """Token i is byte i; 256 begins a text, 257 ends it."""

    has_chat_template = True
    vocab_size = VOCAB_SIZE
    eos_token_ids = (EOS,)
    bos_token_id = 256
    max_tokens: int | None = None

    def limited(self, max_tokens: int) -> Self:
        limited = copy(self)
        limited.max_tokens = max_tokens
        return limited

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[int]:
        if self.max_tokens is not None and len(text) > self.max_tokens:
            raise ValueError(f"{len(text)} characters, max_model_len ({self.max_tokens})")
        if parse_special_tokens and text.endswith("<256>"):
            text, ending = text.removesuffix("<256>"), [256]
        else:
            ending = []
        return [256] * add_special_tokens + list(text.encode()) + ending

    def decode(self, token_ids: Sequence[int], skip_control_tokens: bool = True) -> str:
        pieces = [
            bytes((i,)) if i < 256 else b"" if skip_control_tokens else b"<%d>" % i
            for i in token_ids
        ]
        return b"".join(pieces).decode(errors="replace")

    def control_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(i for i in (256, EOS) if f"<{i}>" in texts)

    def token_bytes(self, token_id: int, skip_control_tokens: bool = True) -> bytes:
        if token_id < 256:
            return bytes((token_id,))
        return b"" if skip_control_tokens else b"<%d>" % token_id

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, str | bool] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        parse_special_tokens: bool = False,
    ) -> list[int]:
        for message in messages:
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"the chat template does not know the role {message['role']!r}")
        names = [m["role"] + m.get("name", "").join("()" if "name" in m else "") for m in messages]
        text = "".join(f"[{n}]{m['content']}" for n, m in zip(names, messages, strict=True))
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        text += f"{list(tools)}{calls}" if tools or calls else ""
        arguments = "".join(f"{k}={v!r};" for k, v in sorted((template_arguments or {}).items()))
        end = "" if continue_final_message else "$"
        prompt = arguments + text + end + "[a]" * add_generation_prompt
        return self.encode(prompt, parse_special_tokens=parse_special_tokens)


def expected_token_ids(
    prompt: Sequence[int], num_tokens: int, seed: int = 0, choice: int = 0
) -> list[int]:
    """Returns the tokens of ``FakeEngine``: lower-case letters, a function of the arguments."""
    return [expected_token_id(prompt, i, seed, choice) for i in range(num_tokens)]


def expected_token_id(prompt: Sequence[int], i: int, seed: int = 0, choice: int = 0) -> int:
    """The i-th of them."""
    return 97 + (sum(prompt) + 7 * seed + 5 * choice + 3 * i) % 26


def expected_text(prompt: Sequence[int], num_tokens: int, choice: int = 0) -> str:
    """The same as text."""
    return bytes(expected_token_ids(prompt, num_tokens, choice=choice)).decode()


def expected_logprobs(token_id: int, i: int, num_top: int | None) -> tuple[TokenLogprobs, ...]:
    """The log-probabilities of one token, at some position; none where none are asked for."""
    if num_top is None:
        return ()
    top = tuple(((token_id + k) % VOCAB_SIZE, -0.5 * i - k) for k in range(num_top))
    return (TokenLogprobs(token_id, -0.5 * i, 1, top),)


@dataclass
class _Running:
    request: Request
    choice: int
    num_output_tokens: int = 0
    num_pages: int = 0


@dataclass
class FakeEngine:
    """One token a step for every choice; ``eos_after`` tokens end in an end-of-sequence token.

    ``step_seconds`` is how long a step takes: an engine that never lets go of the interpreter's
    lock, as no device does, would starve the asyncio thread that has to read and to cancel.
    ``fail_after_steps`` is the step that raises. A request for ``endless_at`` tokens runs until it
    is aborted. ``gate``, when cleared, stops steps from ending. ``lost`` are ids that it forgets
    at once. ``script`` are token ids to generate instead. ``num_tokens`` come a step, and
    ``late`` steps after they were made: also those of choices that were aborted meanwhile.
    """

    eos_after: int | None = None
    step_seconds: float = 2e-4
    fail_after_steps: int | None = None
    num_cached_tokens: int = 0
    endless_at: int | None = None
    lost: tuple[str, ...] = ()
    script: Sequence[int] = ()
    num_tokens: int = 1
    late: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    num_steps: int = 0
    max_running: int = 0
    requests: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    aborted_choices: list[tuple[str, int]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    _running: dict[tuple[str, int], _Running] = field(default_factory=dict)
    _on_the_way: list[list[RequestOutput]] = field(default_factory=list)
    _totals: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        self.gate.set()

    def add(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        assert (request.request_id, 0) not in self._running
        if request.prompt_token_ids[0] == 255:
            raise ValueError("this engine cannot serve a prompt that starts with 255")
        self.requests.append(request)
        if request.request_id in self.lost:
            return
        num_pages = -(-(len(request.prompt_token_ids) + request.max_tokens) // PAGE_SIZE)
        for choice in range(request.n):
            running = _Running(request, choice, num_pages=num_pages)
            self._running[request.request_id, choice] = running
        self._totals[0] += len(request.prompt_token_ids)
        self.max_running = max(self.max_running, len(self._running))

    def abort(self, request_id: str, choice: int | None = None) -> None:
        self.threads.add(threading.get_ident())
        if choice is None:
            self.aborted.append(request_id)
        else:
            self.aborted_choices.append((request_id, choice))
        for key in tuple(self._running):
            if key[0] == request_id and choice in (None, key[1]):
                del self._running[key]

    def step(self) -> list[RequestOutput]:
        self.threads.add(threading.get_ident())
        assert self.gate.wait(timeout=HANG_SECONDS)
        if self.step_seconds:
            time.sleep(self.step_seconds)
        self.num_steps += 1
        if self.fail_after_steps is not None and self.num_steps > self.fail_after_steps:
            raise RuntimeError("the device is gone")
        made = [self._advance(running) for running in tuple(self._running.values())]
        self._on_the_way.append(made)
        is_due = len(self._on_the_way) > self.late or not self._running
        return self._on_the_way.pop(0) if is_due else []

    @property
    def has_unfinished(self) -> bool:
        return bool(self._running or any(self._on_the_way))

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=0,
            num_pages=NUM_PAGES,
            num_free_pages=NUM_PAGES - sum(r.num_pages for r in self._running.values()),
            num_prompt_tokens=self._totals[0],
            num_output_tokens=self._totals[1],
            num_preemptions=0,
            num_cached_tokens=self.num_cached_tokens,
            num_cached_pages=3,
            num_drafted_tokens=2 * self._totals[1],
            num_accepted_tokens=self._totals[1],
        )

    def _advance(self, running: _Running) -> RequestOutput:
        request, first = running.request, running.num_output_tokens
        token_ids, reason = [], None
        while len(token_ids) < self.num_tokens and reason is None:
            token_id, reason = self._next_token(running)
            token_ids.append(token_id)
            running.num_output_tokens += 1
        self._totals[1] += len(token_ids)
        if reason is not None:
            del self._running[request.request_id, running.choice]
        return RequestOutput(
            request_id=request.request_id,
            choice=running.choice,
            token_ids=tuple(token_ids),
            finish_reason=reason,
            logprobs=tuple(
                entry
                for i, token_id in enumerate(token_ids)
                for entry in expected_logprobs(token_id, first + i, request.logprobs)
            ),
            prompt_logprobs=self._prompt_logprobs(running) if first == 0 else (),
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=running.num_output_tokens,
            num_drafted_tokens=2 * running.num_output_tokens,
            num_accepted_tokens=running.num_output_tokens,
            queue_seconds=0.0,
        )

    def _next_token(self, running: _Running) -> tuple[int, FinishReason | None]:
        request, i = running.request, running.num_output_tokens
        token_id = expected_token_id(
            request.prompt_token_ids, i, request.sampling.seed, running.choice
        )
        if i < len(self.script):
            token_id = self.script[i]
        if i == self.eos_after and not request.ignore_eos:
            return EOS, FinishReason.STOP
        if token_id in request.stop_token_ids and i >= request.min_tokens:
            return token_id, FinishReason.STOP
        if i + 1 == request.max_tokens != self.endless_at:
            return token_id, FinishReason.LENGTH
        return token_id, None

    def _prompt_logprobs(self, running: _Running) -> tuple[TokenLogprobs | None, ...]:
        request = running.request
        if request.prompt_logprobs is None or running.choice:
            return ()
        return (
            None,
            *(
                entry
                for i, token_id in enumerate(request.prompt_token_ids[1:], start=1)
                for entry in expected_logprobs(token_id, i, request.prompt_logprobs)
            ),
        )


def served_model(*engines: FakeEngine) -> ServedModel:
    return ServedModel(
        name="fake",
        model=ModelConfig(
            architecture="llama",
            vocab_size=VOCAB_SIZE,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
        ),
        engines=engines,
        engine_config=EngineConfig(
            max_model_len=MAX_MODEL_LEN, page_size=PAGE_SIZE, num_pages=NUM_PAGES
        ),
        dtypes=DtypePolicy.for_platform("cpu"),
        tokenizer=ByteTokenizer(),
    )
