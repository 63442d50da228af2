"""The size of the largest request that is within all limits of its fields, in bytes on the wire.

So it is a field's limit that refuses a prompt that is too long, by name, and not gRPC's own, whose
RESOURCE_EXHAUSTED asks clients to try again. Knows no messages: only numbers.
"""

from jaxinfer.request import LIMITS
from serving.text.conversation import CHAT_LIMITS

# A character in UTF-8; a field's number and length; a field of a 64-bit number; one of an id of
# 32 bits, packed or not.
_CHARACTER, _FIELD, _NUMBER, _TOKEN_ID = 4, 7, 12, 7
# For single numbers, and for fields that come with a newer schema.
_SPARE = 64 << 10


def _largest_request() -> int:
    high = {name: int(limit.high) for name, limit in {**LIMITS, **CHAT_LIMITS}.items()}

    def strings(number: int, characters: int) -> int:
        return number * (_FIELD + _CHARACTER * characters)

    # The characters of contents, calls, tools and template arguments count as prompt together.
    message = (
        strings(1, high["role_characters"])
        + strings(2, high["name_characters"])
        + strings(1 + high["num_tools"], 0)
    )
    chat = (
        _CHARACTER * high["prompt_characters"]
        + high["messages"] * (_FIELD + message)
        + strings(high["num_tools"], 0)
        + high["num_template_arguments"]
        * (strings(1, high["template_argument_characters"]) + strings(2, 0))
    )
    token_ids = _TOKEN_ID * high["num_token_ids"]
    sampling = (
        strings(high["num_stop"], high["stop_characters"])
        + _TOKEN_ID * high["num_ending_token_ids"]
        + high["num_logit_bias"] * (_FIELD + 2 * _NUMBER)
    )
    names = strings(1, high["request_id_characters"]) + strings(1, high["cache_salt_characters"])
    return max(chat, token_ids) + sampling + names + _SPARE


MAX_MESSAGE_BYTES = _largest_request()
