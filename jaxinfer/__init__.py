"""The inference engine: requests in, tokens out. It never loads a file and never opens a port.

``LLM``, ``Client`` and the values that go with them are found here too; each is imported when it is
first asked for, so that ``import jaxinfer`` takes no time and a client needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.engine import Engine
    from jaxinfer.request import Request, SamplingParams
    from jaxinfer_entrypoints.llm import LLM
    from serving.client import Client, Message

__all__ = ["LLM", "Client", "Engine", "Message", "Request", "SamplingParams"]

_MODULES = {
    "LLM": "jaxinfer_entrypoints.llm",
    "Client": "serving.client",
    "Engine": "jaxinfer.engine",
    "Message": "serving.client",
    "Request": "jaxinfer.request",
    "SamplingParams": "jaxinfer.request",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
