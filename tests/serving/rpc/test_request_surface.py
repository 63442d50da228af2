"""Random requests: whatever a client sends is answered or refused, and no page is lost."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.proto.jaxinfer.v1 import inference_pb2_grpc
from tests.patience import HANG_SECONDS
from tests.serving.fakes import NUM_PAGES, FakeEngine
from tests.serving.running import running_server, until

OK = grpc.StatusCode.OK
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)

# A request that only its cancellation ends.
ENDLESS = 300

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
int32 = st.integers(-(1 << 31), (1 << 31) - 1)
uint32 = st.integers(0, (1 << 32) - 1)
small = st.integers(0, 40)
number = st.floats() | st.floats(0, 1) | st.sampled_from((0.0, 1.0))


def optional[T](strategy: st.SearchStrategy[T]) -> st.SearchStrategy[T | None]:
    return st.none() | strategy


served_sampling = st.builds(
    pb.SamplingParams,
    temperature=optional(st.floats(0, 2)),
    top_k=optional(small),
    top_p=optional(st.floats(0.01, 1)),
    seed=optional(st.integers(0, (1 << 64) - 1)),
    max_tokens=optional(st.integers(8, 40)),
    ignore_eos=optional(st.booleans()),
    min_p=optional(st.floats(0, 1)),
    repetition_penalty=optional(st.floats(0.1, 2)),
    presence_penalty=optional(st.floats(-2, 2)),
    frequency_penalty=optional(st.floats(-2, 2)),
    logit_bias=st.dictionaries(st.integers(0, 257), st.floats(-100, 100), max_size=2),
    min_tokens=optional(st.integers(0, 8)),
    stop=st.lists(st.text("abcdefgh", min_size=1, max_size=2), max_size=2),
    stop_token_ids=st.lists(st.integers(97, 100), max_size=1),
    include_stop_in_output=optional(st.booleans()),
    n=optional(st.integers(1, 4)),
    logprobs=optional(st.integers(0, 3)),
    prompt_logprobs=optional(st.integers(0, 3)),
    skip_control_tokens=optional(st.booleans()),
)
wild_sampling = st.builds(
    pb.SamplingParams,
    temperature=optional(number),
    top_k=optional(int32),
    top_p=optional(number),
    seed=optional(st.integers(0, (1 << 64) - 1)),
    max_tokens=optional(int32 | small),
    ignore_eos=optional(st.booleans()),
    min_p=optional(number),
    repetition_penalty=optional(number),
    presence_penalty=optional(number),
    frequency_penalty=optional(number),
    logit_bias=st.dictionaries(uint32, number, max_size=1),
    min_tokens=optional(int32 | small),
    stop=st.lists(text, max_size=2),
    stop_token_ids=st.lists(uint32, max_size=2),
    include_stop_in_output=optional(st.booleans()),
    n=optional(int32 | small),
    logprobs=optional(int32 | small),
    prompt_logprobs=optional(int32 | small),
    skip_control_tokens=optional(st.booleans()),
)
refused_sampling = st.builds(
    pb.SamplingParams,
    min_p=optional(st.floats(0, 1)),
    structured_output=st.builds(pb.StructuredOutput, regex=text),
)
request_id = st.text("abc", min_size=1, max_size=2)


def prompts(
    role: st.SearchStrategy[str], token_id: st.SearchStrategy[int], min_size: int
) -> st.SearchStrategy[pb.GenerateRequest]:
    """Prompts of every form; ``min_size`` messages or token ids at least."""
    message = st.builds(pb.ChatMessage, role=role, content=text)
    messages = st.lists(message, min_size=min_size, max_size=3)
    token_ids = st.lists(token_id, min_size=min_size, max_size=20)
    return st.one_of(
        st.builds(pb.GenerateRequest, text=text),
        st.builds(pb.GenerateRequest, token_ids=st.builds(pb.TokenIds, ids=token_ids)),
        st.builds(pb.GenerateRequest, chat=st.builds(pb.Chat, messages=messages)),
    )


prompt = prompts(st.sampled_from(("system", "user")), st.integers(0, 254), 1)
wild_prompt = prompts(text, uint32, 0) | st.just(pb.GenerateRequest())


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    # Mostly requests that can be served, so that cancelling and finishing are tried too.
    kind = draw(st.sampled_from(("served",) * 6 + ("wild", "wild", "refused", "newer")))
    sampling = {"wild": wild_sampling, "refused": refused_sampling}.get(kind, served_sampling)
    request = pb.GenerateRequest(
        request_id=draw(optional(text if kind == "wild" else request_id)),
        sampling=draw(sampling),
        stream=draw(optional(st.booleans())),
        add_special_tokens=draw(st.none() if kind == "served" else optional(st.booleans())),
    )
    request.MergeFrom(draw(wild_prompt if kind == "wild" else prompt))
    if kind == "newer":
        request.MergeFromString(b"\x80\x7d\x01")
    return request


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[asyncio.Runner, str, FakeEngine]]:
    """One server for all examples; its asyncio loop runs while an example runs."""
    engine = FakeEngine(eos_after=25, endless_at=ENDLESS)
    with asyncio.Runner() as runner:
        context = running_server(engine)
        target, _ = runner.run(context.__aenter__())
        yield runner, target, engine
        runner.run(context.__aexit__(None, None, None))


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(requests(), st.none() | st.integers(0, 20)), min_size=1, max_size=3))
def test_any_request_is_answered_or_refused_and_no_page_is_lost(
    server: tuple[asyncio.Runner, str, FakeEngine],
    calls: list[tuple[pb.GenerateRequest, int | None]],
) -> None:
    runner, target, engine = server

    async def call(
        stub: inference_pb2_grpc.InferenceStub, request: pb.GenerateRequest, cancel: int | None
    ) -> None:
        if cancel is not None:
            request.sampling.MergeFrom(pb.SamplingParams(max_tokens=ENDLESS, ignore_eos=True))
            request.sampling.ClearField("stop")
            request.sampling.ClearField("stop_token_ids")
            # So that pages can be counted: a choice takes some twenty of them.
            request.sampling.ClearField("n")
        stream = stub.Generate(request, timeout=HANG_SECONDS)
        if cancel is not None:
            asyncio.get_running_loop().call_later(cancel / 1000, stream.cancel)
        events: list[str | None] = []
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            while isinstance(response := await stream.read(), pb.GenerateResponse):
                events.append(response.WhichOneof("event"))
        code = await stream.code()
        if code is OK:
            assert events[0] == "started"
            assert events[-1] == "finished"
            assert events.count("started") == 1
            assert events.count("finished") == max(request.sampling.n, 1)
        elif code is not grpc.StatusCode.CANCELLED or cancel is None:
            # Random ids collide now and then.
            assert code in (*REFUSALS, grpc.StatusCode.ALREADY_EXISTS), await stream.details()
            assert await stream.details()
            assert events == []

    async def example() -> None:
        async with asyncio.timeout(HANG_SECONDS), grpc.aio.insecure_channel(target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            await asyncio.gather(*(call(stub, request, cancel) for request, cancel in calls))
            await until(lambda: engine.stats.num_free_pages == NUM_PAGES)

    runner.run(example())
