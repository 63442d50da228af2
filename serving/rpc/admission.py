"""From a message to a request that is known to fit the served model. Knows no gRPC, no threads.

Every function raises ``ValueError`` naming the field, the value and the limit.
"""

from collections.abc import Callable, Sequence
from functools import partial

from jaxinfer.request import Request, SamplingParams
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.rpc.chat_inputs import chat_inputs
from serving.rpc.validate import (
    check_generation,
    check_prompt,
    is_on,
    max_tokens_in_effect,
    min_tokens_in_effect,
    sampling_params,
    text_options,
)
from serving.served_model import ServedModel, Tokenizer
from serving.text.output_text import TextOptions

# A message takes a template as long as so many characters take a tokenizer.
_MESSAGE_CHARACTERS = 64


def check_wishes(message: pb.GenerateRequest, served: ServedModel) -> SamplingParams:
    """Checks what needs no tokens; returns the sampling, its seed drawn where none is given."""
    check_generation(message, served.name)
    return sampling_params(message.sampling, served.default_sampling)


def prompt_encoder(
    message: pb.GenerateRequest | pb.TokenizeRequest, tokenizer: Tokenizer
) -> tuple[Callable[[], Sequence[int]], int]:
    """Checks a prompt; returns what makes its token ids, and the characters that takes."""
    parses = message.parse_special_tokens
    num_characters = check_prompt(message, tokenizer.has_chat_template)
    match message.WhichOneof("prompt"):
        case "text":
            adds = is_on(message, "add_special_tokens")
            return partial(tokenizer.encode, message.text, adds, parses), num_characters
        case "chat":
            inputs = chat_inputs(message.chat)
            encode = partial(tokenizer.encode_chat, *inputs, parses)
            return encode, num_characters + _MESSAGE_CHARACTERS * len(inputs.messages)
        case _:
            assert isinstance(message, pb.GenerateRequest)
            token_ids = message.token_ids.ids
            return lambda: token_ids, 0


def stop_tokens(
    token_ids: Sequence[int], options: TextOptions, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Returns ``token_ids``, and the control tokens that are stop strings.

    Text has none of these, so that a string that is one ("<|im_end|>") would never be found in it.
    """
    control = tokenizer.control_tokens(options.stop) if options.skip_control_tokens else ()
    return (*token_ids, *(token_id for token_id in control if token_id not in token_ids))


def admitted_request(
    message: pb.GenerateRequest,
    request_id: str,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    served: ServedModel,
) -> Request:
    """Makes the request of a message whose prompt is ``token_ids``."""
    wanted, max_model_len = message.sampling, served.engine_config.max_model_len
    max_tokens = max_tokens_in_effect(wanted, len(token_ids), max_model_len)
    default_min_tokens = served.default_ending.min_tokens
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(token_ids),
        max_tokens=max_tokens,
        sampling=sampling,
        eos_token_ids=served.tokenizer.eos_token_ids,
        ignore_eos=wanted.ignore_eos,
        stop_token_ids=stop_tokens(
            wanted.stop_token_ids, text_options(wanted, served.default_ending), served.tokenizer
        ),
        min_tokens=min_tokens_in_effect(wanted, default_min_tokens, max_tokens),
        n=wanted.n if wanted.HasField("n") else 1,
        logprobs=wanted.logprobs if wanted.HasField("logprobs") else None,
        prompt_logprobs=wanted.prompt_logprobs if wanted.HasField("prompt_logprobs") else None,
        priority=message.priority,
        cache_salt=message.cache_salt,
    )
    request.check_fits(served.model.num_tokens, max_model_len)
    return request
