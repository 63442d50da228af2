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
from tests.serving.fakes import NUM_PAGES, FakeEngine
from tests.serving.running import running_server, until

OK = grpc.StatusCode.OK
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)

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
    max_tokens=optional(st.integers(1, 40)),
    ignore_eos=optional(st.booleans()),
)
any_sampling = st.builds(
    pb.SamplingParams,
    temperature=optional(number),
    top_k=optional(int32),
    top_p=optional(number),
    min_p=optional(number),
    repetition_penalty=optional(number),
    logit_bias=st.dictionaries(uint32, number, max_size=1),
    seed=optional(st.integers(0, (1 << 64) - 1)),
    structured_output=optional(st.builds(pb.StructuredOutput, regex=text)),
    max_tokens=optional(int32 | small),
    min_tokens=optional(int32),
    stop=st.lists(text, max_size=1),
    ignore_eos=optional(st.booleans()),
    n=optional(int32),
    logprobs=optional(int32),
)
chat = st.builds(
    pb.Chat,
    messages=st.lists(
        st.builds(pb.ChatMessage, role=text | st.sampled_from(("user", "system")), content=text),
        max_size=3,
    ),
)
token_ids = st.builds(pb.TokenIds, ids=st.lists(uint32 | st.integers(0, 257), max_size=20))
prompt = st.one_of(
    st.builds(pb.GenerateRequest, text=text),
    st.builds(pb.GenerateRequest, token_ids=token_ids),
    st.builds(pb.GenerateRequest, chat=chat),
    st.just(pb.GenerateRequest()),
)


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        request_id=draw(optional(text)),
        sampling=draw(optional(served_sampling | any_sampling)),
        stream=draw(optional(st.booleans())),
        add_special_tokens=draw(optional(st.booleans())),
        priority=draw(optional(int32) if draw(small) == 0 else st.none()),
    )
    request.MergeFrom(draw(prompt))
    # Fields of a newer schema, or a message that another one was mistaken for.
    if draw(small) == 0:
        request.MergeFromString(b"\x80\x7d\x01")
    return request


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[asyncio.Runner, str, FakeEngine]]:
    """One server for all examples; its asyncio loop runs while an example runs."""
    engine = FakeEngine(eos_after=25)
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
@given(st.lists(st.tuples(requests(), st.none() | st.integers(0, 5)), min_size=1, max_size=3))
def test_any_request_is_answered_or_refused_and_no_page_is_lost(
    server: tuple[asyncio.Runner, str, FakeEngine],
    calls: list[tuple[pb.GenerateRequest, int | None]],
) -> None:
    runner, target, engine = server

    async def call(
        stub: inference_pb2_grpc.InferenceStub, request: pb.GenerateRequest, cancel: int | None
    ) -> None:
        stream = stub.Generate(request, timeout=20)
        events: list[str | None] = []
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for response in stream:
                events.append(response.WhichOneof("event"))
                if len(events) == cancel:
                    stream.cancel()
        code = await stream.code()
        if code is OK:
            assert events[0] == "started"
            assert events[-1] == "finished"
        elif code is not grpc.StatusCode.CANCELLED or cancel is None:
            # Random ids collide now and then.
            assert code in (*REFUSALS, grpc.StatusCode.ALREADY_EXISTS), await stream.details()
            assert await stream.details()
            assert events == []

    async def example() -> None:
        async with asyncio.timeout(30), grpc.aio.insecure_channel(target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            await asyncio.gather(*(call(stub, request, cancel) for request, cancel in calls))
            await until(lambda: engine.stats.num_free_pages == NUM_PAGES)

    runner.run(example())
