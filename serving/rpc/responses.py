"""Answers of the service, as messages: made of outputs and descriptions, sent elsewhere."""

from collections.abc import Iterable

from jaxinfer.request import LIMITS, SAMPLING_OPTIONS, FinishReason, Limit, Request
from jaxinfer.schedule import RequestOutput, TokenLogprobs
from serving.message_size import MAX_MESSAGE_BYTES
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.request_checks import DEFAULT_MAX_TOKENS
from serving.request_stream import TextOutput
from serving.rpc.validate import SUPPORTED_FIELDS
from serving.served_model import ServedModel, Tokenizer, package_version
from serving.text.conversation import CHAT_LIMITS

_MESSAGE_LIMITS = {"message_bytes": Limit(0, MAX_MESSAGE_BYTES)}
_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}


def started(request: Request, output: RequestOutput, tokenizer: Tokenizer) -> pb.GenerateResponse:
    """The first event, of choice 0's first output; time is linear in its prompt_logprobs."""
    return pb.GenerateResponse(
        started=pb.Started(
            request_id=request.request_id,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=output.num_cached_tokens,
            seeds=(request.sampling.seed,) if request.sampling.temperature > 0 else (),
            max_tokens=request.max_tokens,
            prompt_logprobs=_logprobs(output.prompt_logprobs, tokenizer),
        )
    )


def delta(output: TextOutput, tokenizer: Tokenizer) -> pb.GenerateResponse:
    """New tokens and text of a choice."""
    told = output.output
    return pb.GenerateResponse(
        delta=pb.Delta(
            choice=told.choice,
            text=output.text,
            token_ids=told.token_ids,
            logprobs=_logprobs(told.logprobs, tokenizer),
        )
    )


def finished(output: TextOutput, timings: pb.Timings) -> pb.GenerateResponse:
    """The last event of a choice, of the output that has a ``finish_reason``."""
    told = output.output
    assert told.finish_reason is not None
    event = pb.Finished(
        choice=told.choice,
        reason=_FINISH_REASONS[told.finish_reason],
        usage=pb.Usage(
            num_prompt_tokens=told.num_prompt_tokens,
            num_cached_tokens=told.num_cached_tokens,
            num_output_tokens=told.num_output_tokens,
            num_drafted_tokens=told.num_drafted_tokens,
            num_accepted_tokens=told.num_accepted_tokens,
            num_preemptions=told.num_preemptions,
        ),
        timings=timings,
    )
    if output.stop_string is not None:
        event.stop_string = output.stop_string
    elif told.finish_reason is FinishReason.STOP and told.token_ids:
        event.stop_token_id = told.token_ids[-1]
    return pb.GenerateResponse(finished=event)


def _logprobs(
    logprobs: Iterable[TokenLogprobs | None], tokenizer: Tokenizer
) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs()
        if entry is None
        else pb.TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=[
                pb.TopLogprob(
                    token_id=token_id, logprob=logprob, token=_token_bytes(token_id, tokenizer)
                )
                for token_id, logprob in entry.top
            ],
        )
        for entry in logprobs
    ]


def _token_bytes(token_id: int, tokenizer: Tokenizer) -> bytes:
    # The model's vocabulary may be larger than the tokenizer's.
    if token_id >= tokenizer.vocab_size:
        return b""
    return tokenizer.token_bytes(token_id, skip_control_tokens=False)


def model_info(served: ServedModel) -> pb.GetModelInfoResponse:
    """Describes the served model."""
    num_engines = len(served.engines)
    return pb.GetModelInfoResponse(
        model_name=served.name,
        architecture=served.model.architecture,
        max_model_len=served.engine_config.max_model_len,
        max_position_embeddings=served.model.max_position_embeddings,
        vocab_size=served.model.vocab_size,
        weights_dtype=served.dtypes.weights,
        activations_dtype=served.dtypes.activations,
        kv_cache_dtype=served.dtypes.kv_cache,
        quantization=served.dtypes.quantization or "",
        num_pages=served.engine_config.num_pages * num_engines,
        page_size=served.engine_config.page_size,
        max_num_seqs=served.engine_config.max_num_seqs * num_engines,
        max_num_batched_tokens=served.engine_config.max_num_batched_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        limits=[
            pb.FieldLimit(name=name, low=limit.low, high=limit.high, low_excluded=limit.above)
            for name, limit in {**LIMITS, **CHAT_LIMITS, **_MESSAGE_LIMITS}.items()
        ],
        supported_fields=sorted(
            f"{message}.{field}" for message, fields in SUPPORTED_FIELDS.items() for field in fields
        ),
        version=package_version(),
        eos_token_ids=served.tokenizer.eos_token_ids,
        bos_token_id=served.tokenizer.bos_token_id,
        has_chat_template=served.tokenizer.has_chat_template,
        default_sampling=pb.SamplingParams(
            **{
                option.name: getattr(served.default_sampling, option.name)
                for option in SAMPLING_OPTIONS
                if option.has_model_default
            },
            logit_bias=dict(served.default_sampling.logit_bias),
            min_tokens=served.default_ending.min_tokens,
            stop=served.default_ending.stop,
        ),
    )
