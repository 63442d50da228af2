"""An engine and a tokenizer without a model: deterministic tokens, counted pages, any failure."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import EngineStats, RequestOutput
from serving.served_model import ServedModel

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

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [256] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_control_tokens: bool = True) -> str:
        pieces = [
            bytes((i,)) if i < 256 else b"" if skip_control_tokens else b"<%d>" % i
            for i in token_ids
        ]
        return b"".join(pieces).decode(errors="replace")

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        for message in messages:
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"the chat template does not know the role {message['role']!r}")
        return self.encode("".join(f"[{m['role']}]{m['content']}" for m in messages))


class ByteDetokenizer:
    """Holds back the bytes of a character that is not complete."""

    def __init__(self) -> None:
        self._held = b""

    def add(self, token_ids: Sequence[int]) -> str:
        self._held += bytes(i for i in token_ids if i < 256)
        for length in range(len(self._held), max(len(self._held) - 4, -1), -1):
            try:
                text = self._held[:length].decode()
            except UnicodeDecodeError:
                continue
            self._held = self._held[length:]
            return text
        return ""

    def finish(self) -> str:
        return self._held.decode(errors="replace")


def expected_token_ids(prompt: Sequence[int], num_tokens: int, seed: int = 0) -> list[int]:
    """What ``FakeEngine`` generates: lower-case letters, a function of prompt, seed, position."""
    return [expected_token_id(prompt, i, seed) for i in range(num_tokens)]


def expected_token_id(prompt: Sequence[int], i: int, seed: int = 0) -> int:
    """The i-th of them."""
    return 97 + (sum(prompt) + 7 * seed + 3 * i) % 26


@dataclass
class _Running:
    request: Request
    num_output_tokens: int = 0
    num_pages: int = 0


@dataclass
class FakeEngine:
    """One token a step for every request; ``eos_after`` tokens end in an end-of-sequence token.

    ``step_seconds`` is how long a step takes: an engine that never lets go of the interpreter's
    lock, as no device does, would starve the asyncio thread that has to read and to cancel.
    ``fail_after_steps`` is the step that raises. A request for ``endless_at`` tokens runs until it
    is aborted. ``gate``, when cleared, stops steps from ending. ``lost`` are ids that it forgets
    at once.
    """

    eos_after: int | None = None
    step_seconds: float = 2e-4
    fail_after_steps: int | None = None
    num_cached_tokens: int = 0
    endless_at: int | None = None
    lost: tuple[str, ...] = ()
    gate: threading.Event = field(default_factory=threading.Event)
    num_steps: int = 0
    max_running: int = 0
    aborted: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    _running: dict[str, _Running] = field(default_factory=dict)
    _totals: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        self.gate.set()

    def add(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        assert request.request_id not in self._running
        if request.prompt_token_ids[0] == 255:
            raise ValueError("this engine cannot serve a prompt that starts with 255")
        if request.request_id in self.lost:
            return
        num_pages = -(-(len(request.prompt_token_ids) + request.max_tokens) // PAGE_SIZE)
        self._running[request.request_id] = _Running(request, num_pages=num_pages)
        self._totals[0] += len(request.prompt_token_ids)
        self.max_running = max(self.max_running, len(self._running))

    def abort(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        self.aborted.append(request_id)
        self._running.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        self.threads.add(threading.get_ident())
        assert self.gate.wait(timeout=20)
        if self.step_seconds:
            time.sleep(self.step_seconds)
        self.num_steps += 1
        if self.fail_after_steps is not None and self.num_steps > self.fail_after_steps:
            raise RuntimeError("the device is gone")
        return [self._advance(running) for running in tuple(self._running.values())]

    @property
    def has_unfinished(self) -> bool:
        return bool(self._running)

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
        )

    def _advance(self, running: _Running) -> RequestOutput:
        request, i = running.request, running.num_output_tokens
        token_id = expected_token_id(request.prompt_token_ids, i, request.sampling.seed)
        reason = None
        if i == self.eos_after and not request.ignore_eos:
            token_id, reason = EOS, FinishReason.STOP
        elif i + 1 == request.max_tokens != self.endless_at:
            reason = FinishReason.LENGTH
        running.num_output_tokens += 1
        self._totals[1] += 1
        if reason is not None:
            del self._running[request.request_id]
        return RequestOutput(
            request_id=request.request_id,
            token_ids=(token_id,),
            finish_reason=reason,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=running.num_output_tokens,
            queue_seconds=0.0,
        )


def served_model(engine: FakeEngine) -> ServedModel:
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
        engine=engine,
        engine_config=EngineConfig(
            max_model_len=MAX_MODEL_LEN, page_size=PAGE_SIZE, num_pages=NUM_PAGES
        ),
        dtypes=DtypePolicy.for_platform("cpu"),
        tokenizer=ByteTokenizer(),
        new_detokenizer=ByteDetokenizer,
    )
