"""What a server serves: an engine, a tokenizer and their description. Knows no gRPC, no files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from serving.loop import Engine


class Tokenizer(Protocol):
    """What the service needs of a tokenizer. Its methods may be called from several threads."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_control_tokens: bool = True) -> str: ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Raises ``ValueError`` when the template refuses the conversation."""
        ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def bos_token_id(self) -> int | None: ...


class Detokenizer(Protocol):
    """Turns one output's tokens into text as they come, whole characters only."""

    def add(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str:
        """What was held back; called once, after the last token."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """All that a service is given. ``quantization`` names the weights' format, "" for none."""

    name: str
    model: ModelConfig
    engine: Engine
    engine_config: EngineConfig
    dtypes: DtypePolicy
    tokenizer: Tokenizer
    new_detokenizer: Callable[[], Detokenizer]
    quantization: str = ""


def package_version() -> str:
    """The installed version of jaxinfer, "unknown" in a bare checkout."""
    try:
        return metadata.version("jaxinfer")
    except metadata.PackageNotFoundError:
        return "unknown"
