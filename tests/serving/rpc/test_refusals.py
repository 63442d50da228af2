"""Requests that must be refused over the wire: by name and limit, with no effect on pages."""

from typing import Any

import grpc
import pytest

from jaxinfer.request import LIMITS
from serving.client import ServerError
from serving.message_size import MAX_MESSAGE_BYTES
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.proto.jaxinfer.v1 import inference_pb2_grpc
from serving.text.conversation import CHAT_LIMITS
from tests.patience import HANG_SECONDS
from tests.serving.fakes import MAX_MODEL_LEN, NUM_PAGES, FakeEngine
from tests.serving.running import run, running_server


def refusal(request: pb.GenerateRequest) -> ServerError:
    """Returns the answer to a request that must be refused with no effect on the server's pages."""

    async def test() -> ServerError:
        engine = FakeEngine()
        async with running_server(engine) as (target, _):
            error = await call_error(target, request)
            assert engine.stats.num_free_pages == NUM_PAGES
            return error

    return run(test())


async def call_error(target: str, request: pb.GenerateRequest) -> ServerError:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        try:
            async for _ in stub.Generate(request, timeout=HANG_SECONDS):
                pass
        except grpc.aio.AioRpcError as error:
            return ServerError(error.code().name, error.details() or "")
    raise AssertionError("the request was not refused")


def ids(*token_ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=token_ids)


def chat(*messages: tuple[str, str]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=r, content=c) for r, c in messages])


def with_tools(further: pb.Chat) -> pb.GenerateRequest:
    request = pb.GenerateRequest(chat=chat(("user", "x")))
    request.chat.MergeFrom(further)
    return request


def sampled(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="a", sampling=pb.SamplingParams(**sampling))


REFUSED = {
    "no prompt": (pb.GenerateRequest(), "no prompt"),
    "no tokens": (pb.GenerateRequest(token_ids=ids()), "no tokens"),
    "empty text": (pb.GenerateRequest(text="", add_special_tokens=False), "no tokens"),
    "no messages": (pb.GenerateRequest(chat=chat()), "chat.messages"),
    "empty role": (pb.GenerateRequest(chat=chat(("", "x"))), "role"),
    "long role": (pb.GenerateRequest(chat=chat(("r" * 65, "x"))), "role"),
    "template": (pb.GenerateRequest(chat=chat(("robot", "x"))), "'robot'"),
    "messages": (pb.GenerateRequest(chat=chat(*[("user", "")] * 1025)), "[1, 1024]"),
    "tool": (with_tools(pb.Chat(tools=["{"])), "chat.tools[0] is no JSON"),
    "tool's kind": (with_tools(pb.Chat(tools=["{}", "[1]"])), "chat.tools[1] must be a JSON obj"),
    "tool's number": (with_tools(pb.Chat(tools=['{"a": NaN}'])), "NaN is no JSON"),
    "deep tool": (with_tools(pb.Chat(tools=['{"a":' * 100_000])), "chat.tools[0] is no JSON"),
    "tools": (with_tools(pb.Chat(tools=["{}"] * 257)), "[0, 256], got 257"),
    "calls": (
        with_tools(pb.Chat(messages=[pb.ChatMessage(role="user", tool_calls=["x"])])),
        "chat.messages[1].tool_calls[0] is no JSON",
    ),
    "call's id": (
        with_tools(pb.Chat(messages=[pb.ChatMessage(role="user", tool_call_id="x" * 65)])),
        "chat.messages[1].tool_call_id",
    ),
    "vocabulary": (pb.GenerateRequest(token_ids=ids(1, 258)), "[0, 257], got 258"),
    "largest id": (pb.GenerateRequest(token_ids=ids((1 << 32) - 1)), "got 4294967295"),
    "context": (pb.GenerateRequest(token_ids=ids(*[1] * MAX_MODEL_LEN)), "max_model_len (512)"),
    "characters": (
        pb.GenerateRequest(text="x" * (int(LIMITS["prompt_characters"].high) + 1)),
        "characters of the prompt",
    ),
    "empty id": (pb.GenerateRequest(text="a", request_id=""), "request_id"),
    "long id": (pb.GenerateRequest(text="a", request_id="i" * 129), "request_id"),
    "strange id": (pb.GenerateRequest(text="a", request_id="a\nb"), "printable"),
    "model": (pb.GenerateRequest(text="a", model="gpt"), "'fake', which is served, got 'gpt'"),
    "priority": (pb.GenerateRequest(text="a", priority=-101), "priority must be in [-100, 100]"),
    "salt": (pb.GenerateRequest(text="a", cache_salt="s" * 129), "characters of cache_salt"),
    "bias id": (sampled(logit_bias={258: 1.0}), "logit_bias must be in [0, 257], got 258"),
    "bias": (sampled(logit_bias={2: float("inf")}), "logit_bias of token 2 must be in [-100"),
    "biases": (sampled(logit_bias=dict.fromkeys(range(301), 0.0)), "number of logit_bias"),
    "stop token": (sampled(stop_token_ids=[258]), "stop_token_ids must be in [0, 257], got 258"),
    "stop tokens": (sampled(stop_token_ids=range(32)), "stop_token_ids must be in [0, 32], got 33"),
    "17 stops": (sampled(stop="abcdefghijklmnopq"), "number of stop must be in [0, 16], got 17"),
    "empty stop": (sampled(stop=[""]), "characters of stop[0] must be in [1, 256], got 0"),
    "long stop": (sampled(stop=["a", "s" * 257]), "characters of stop[1] must be in [1, 256]"),
    "structured": (sampled(structured_output={"regex": "a"}), "structured_output is not supp"),
    "by the engine": (pb.GenerateRequest(token_ids=ids(255)), "starts with 255"),
}


@pytest.mark.parametrize(("request_", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_by_name(request_: pb.GenerateRequest, says: str) -> None:
    error = refusal(request_)
    assert error.code == "INVALID_ARGUMENT"
    assert says in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 101.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", (1 << 31) - 1),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", (1 << 31) - 1),
        ("max_tokens", MAX_MODEL_LEN),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("-inf")),
        ("frequency_penalty", 2.1),
        ("n", 0),
        ("n", 17),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("min_tokens", -1),
        ("min_tokens", 300),
    ],
)
def test_refuses_values_outside_their_limits(name: str, value: float) -> None:
    sampling = pb.SamplingParams()
    setattr(sampling, name, value)
    error = refusal(pb.GenerateRequest(token_ids=ids(1), sampling=sampling))
    assert error.code == "INVALID_ARGUMENT"
    assert name in error.message


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab", b"\x12\x02\xff\xfe"])
@pytest.mark.parametrize("method", ["Generate", "Tokenize", "GetLoad"])
def test_bytes_that_are_no_message_are_refused_without_a_word_in_the_log(
    data: bytes, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with (
            running_server(FakeEngine()) as (target, _),
            grpc.aio.insecure_channel(target) as channel,
        ):
            path = "/jaxinfer.v1.Inference/"
            answer = channel.unary_unary(path + method)
            if method == "Generate":
                answer = channel.unary_stream(path + method)
            for call, code in (
                # An unknown field of GetLoadRequest is well-formed, and refused all the same.
                (answer(data), grpc.StatusCode.INVALID_ARGUMENT),
                (channel.unary_unary(path + "Nothing")(data), grpc.StatusCode.UNIMPLEMENTED),
            ):
                assert await call.code() is code
                assert await call.details()

    run(test())
    assert caplog.text == ""


def test_a_message_that_is_too_large_is_refused_before_it_is_read() -> None:
    error = refusal(pb.GenerateRequest(text="x" * MAX_MESSAGE_BYTES))
    assert error.code == "RESOURCE_EXHAUSTED"
    assert "larger than max" in error.message


def test_no_limit_of_bytes_is_reached_before_the_limit_of_characters() -> None:
    most = int(LIMITS["prompt_characters"].high)
    for character in ("x", "\u00e9", "\u4e2d", "\U0001f600"):
        error = refusal(pb.GenerateRequest(text=character * most))
        assert error.code == "INVALID_ARGUMENT"
        assert "max_model_len" in error.message
    error = refusal(pb.GenerateRequest(text="\U0001f600" * (most + 1)))
    assert error.code == "INVALID_ARGUMENT"
    assert "characters of the prompt must be in [0, 4194304], got 4194305" in error.message


def test_the_largest_request_within_all_limits_is_read() -> None:
    error = refusal(largest_request())
    assert error.code == "INVALID_ARGUMENT"
    assert "max_model_len" in error.message


def largest_request() -> pb.GenerateRequest:
    """Returns a request in which every field is as long as it may be."""
    high = {name: int(limit.high) for name, limit in {**LIMITS, **CHAT_LIMITS}.items()}
    wide, name = "\U0001f600", "\U0001f600" * high["name_characters"]
    message = pb.ChatMessage(
        role="assistant", content="", name=name, tool_call_id=name, tool_calls=["{}"] * 14
    )
    chat = pb.Chat(messages=[message] * high["messages"], tools=["{}"] * high["num_tools"])
    for i in range(high["num_template_arguments"]):
        chat.template_arguments[chr(0x1F600 + i) * high["template_argument_characters"]] = ""
    rest = high["prompt_characters"] - 2 * (14 * high["messages"] + high["num_tools"])
    chat.messages[0].content = wide * rest
    return pb.GenerateRequest(
        request_id="i" * high["request_id_characters"],
        chat=chat,
        cache_salt=wide * high["cache_salt_characters"],
        sampling=pb.SamplingParams(
            stop=[wide * high["stop_characters"]] * high["num_stop"],
            stop_token_ids=range(high["num_ending_token_ids"] - 1),
            logit_bias=dict.fromkeys(range(256), 1.0),
        ),
    )
