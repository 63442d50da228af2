"""The model that a server serves: engines, tokenizer, description. Knows no gRPC, no files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol, Self

from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.request import Ending, SamplingParams
from serving.loop import Engine


class Tokenizer(Protocol):
    """A tokenizer as the service needs it. Its methods may be called from several threads."""

    def limited(self, max_tokens: int) -> Self:
        """The same, which refuses a text at once whose length proves more than ``max_tokens``."""
        ...

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_control_tokens: bool = True) -> str: ...

    def token_bytes(self, token_id: int, skip_control_tokens: bool = True) -> bytes:
        """The bytes of one token, not always whole characters."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, str | bool] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        parse_special_tokens: bool = False,
    ) -> list[int]:
        """Raises ``ValueError`` when the template refuses the conversation."""
        ...

    def control_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        """The control tokens that are written as one of ``texts``."""
        ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def bos_token_id(self) -> int | None: ...


@dataclass(frozen=True)
class ServedModel:
    """All that a service is given.

    ``default_sampling`` and ``default_ending`` are in effect where a request says nothing. Every
    one of ``engines`` has the whole model and an ``engine_config`` of its own; a request is given
    to one of them.
    """

    name: str
    model: ModelConfig
    engines: tuple[Engine, ...]
    engine_config: EngineConfig
    dtypes: DtypePolicy
    tokenizer: Tokenizer
    default_sampling: SamplingParams = field(default_factory=SamplingParams)
    default_ending: Ending = field(default_factory=Ending)


def package_version() -> str:
    """The installed version of jaxinfer, "unknown" in a bare checkout."""
    try:
        return metadata.version("jaxinfer")
    except metadata.PackageNotFoundError:
        return "unknown"
