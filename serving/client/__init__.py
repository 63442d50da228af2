"""The typed client of chat, benchmarks, tests and users. Imports neither JAX nor a model."""

from serving.client.client import DEFAULT_TARGET, AsyncClient, Client, ServerError
from serving.client.events import (
    Completion,
    Delta,
    Event,
    Finished,
    Started,
    Timings,
    TokenLogprobs,
    TopLogprob,
    Usage,
)
from serving.client.options import GenerateOptions, Message, Prompt, PromptOptions

__all__ = [
    "DEFAULT_TARGET",
    "AsyncClient",
    "Client",
    "Completion",
    "Delta",
    "Event",
    "Finished",
    "GenerateOptions",
    "Message",
    "Prompt",
    "PromptOptions",
    "ServerError",
    "Started",
    "Timings",
    "TokenLogprobs",
    "TopLogprob",
    "Usage",
]
