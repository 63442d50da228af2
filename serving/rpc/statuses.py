"""Failures as status codes of gRPC: the one place where they become some."""

import logging
import random
from typing import NoReturn

import grpc

from serving.loop import (
    DuplicateRequestError,
    EngineFailedError,
    NotServingError,
    RequestRefusedError,
    TooManyRequestsError,
)
from serving.rpc.arrivals import MessageTimeoutError

logger = logging.getLogger(__name__)

STATUS_CODES: dict[type[Exception], grpc.StatusCode] = {
    RequestRefusedError: grpc.StatusCode.INVALID_ARGUMENT,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    TooManyRequestsError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotServingError: grpc.StatusCode.UNAVAILABLE,
    EngineFailedError: grpc.StatusCode.INTERNAL,
    MessageTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
}
# Details travel in a header of at most 8 KiB, where a character can take 12 bytes.
MAX_DETAIL_CHARACTERS = 500

# Trailing metadata that clients of gRPC with a policy of retries obey.
RETRY_KEY = "grpc-retry-pushback-ms"
RETRY_MILLISECONDS = (500, 1500)

type Status = tuple[grpc.StatusCode, str]


def status_of(error: Exception, name: str) -> Status:
    """Returns the status of what method ``name`` raised; what is not foreseen goes to the log.

    It keeps nothing of the error, in whose frames a large message may be held.
    """
    for kind, code in STATUS_CODES.items():
        if isinstance(error, kind):
            return code, str(error)[:MAX_DETAIL_CHARACTERS]
    # What went wrong inside is for the log; it may hold other clients' text.
    logger.error("%s failed", name, exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; see the server's log"


async def abort(context: grpc.aio.ServicerContext, status: Status) -> NoReturn:
    """Ends a call with a status; one that may be tried again is told when, by gRPC's own key."""
    hint = ()
    if status[0] is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Not all of them at the same time.
        hint = ((RETRY_KEY, str(random.randint(*RETRY_MILLISECONDS))),)
    await context.abort(*status, trailing_metadata=hint)
    raise AssertionError("abort raises")
