"""Calls over the loopback: what is answered, refused, counted and given back."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from jaxinfer.request import LIMITS, Ending, SamplingParams
from serving.client import AsyncClient, Delta, Finished, Message, ServerError, Started
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.proto.jaxinfer.v1 import inference_pb2_grpc
from serving.text.conversation import CHAT_LIMITS
from tests.serving.fakes import (
    EOS,
    MAX_MODEL_LEN,
    NUM_PAGES,
    FakeEngine,
    expected_text,
    expected_token_ids,
)
from tests.serving.running import run, running_client, running_server, until


def test_a_stop_string_that_is_a_control_token_stops_at_it() -> None:
    """The text has no control tokens, so that it would never be found there."""

    async def test() -> None:
        engine = FakeEngine()
        async with running_client(engine) as client:
            options = {"max_tokens": 2, "stop": ["<256>", "<25"], "stop_token_ids": [7]}
            await client.complete([5], **options)
            await client.complete([5], skip_control_tokens=False, **options)
        assert [request.stop_token_ids for request in engine.requests] == [(7, 256), (7,)]

    run(test())


def test_streams_started_deltas_finished() -> None:
    async def test() -> None:
        async with running_client(FakeEngine(num_cached_tokens=2)) as client:
            events = [
                event async for event in client.generate([5, 6, 7], max_tokens=9, request_id="mine")
            ]
        started, *deltas, finished = events
        assert started == Started("mine", 3, 2, (), 9)
        assert all(isinstance(delta, Delta) for delta in deltas)
        token_ids = [i for delta in deltas if isinstance(delta, Delta) for i in delta.token_ids]
        assert token_ids == expected_token_ids([5, 6, 7], 9)
        text = "".join(delta.text for delta in deltas if isinstance(delta, Delta))
        assert text == bytes(token_ids).decode()
        assert isinstance(finished, Finished)
        assert (finished.reason, finished.stop_token_id) == ("length", None)
        usage, timings = finished.usage, finished.timings
        assert (usage.num_prompt_tokens, usage.num_cached_tokens) == (3, 2)
        assert usage.num_output_tokens == 9
        assert (usage.num_drafted_tokens, usage.num_accepted_tokens) == (18, 9)
        assert timings.queue_seconds == 0.0
        assert timings.time_to_first_token_seconds is not None
        assert timings.total_seconds is not None
        assert 0 < timings.time_to_first_token_seconds <= timings.total_seconds

    run(test())


def test_without_streaming_the_same_events_have_one_delta() -> None:
    async def test() -> None:
        async with running_client(FakeEngine(step_seconds=0.002)) as client:
            streamed = await client.complete("abc", max_tokens=30)
            kinds = [
                type(event) async for event in client.generate("abc", max_tokens=30, stream=False)
            ]
            whole = await client.complete("abc", max_tokens=30, stream=False)
        assert kinds == [Started, Delta, Finished]
        assert (whole.text, whole.token_ids) == (streamed.text, streamed.token_ids)
        timings = whole.finished.timings
        assert timings.time_to_first_token_seconds is not None
        assert timings.total_seconds is not None
        assert timings.time_to_first_token_seconds < timings.total_seconds / 2

    run(test())


@pytest.mark.parametrize("stream", [True, False])
def test_the_end_of_sequence_token_counts_but_has_no_text(stream: bool) -> None:
    async def test() -> None:
        async with running_client(FakeEngine(eos_after=3)) as client:
            done = await client.complete([1], max_tokens=50, stream=stream)
            through = await client.complete([1], max_tokens=5, ignore_eos=True, stream=stream)
        assert done.token_ids[-1] == done.finished.stop_token_id == EOS
        assert done.finished.reason == "stop"
        assert done.finished.usage.num_output_tokens == 4 == len(done.token_ids)
        assert len(done.text) == 3
        assert through.finished.reason == "length"

    run(test())


def test_prompt_forms() -> None:
    async def test() -> None:
        async with running_client(FakeEngine()) as client:
            text = await client.complete("hi", max_tokens=4)
            bare = await client.complete("hi", max_tokens=4, add_special_tokens=False)
            chat = await client.complete([Message("user", "hi")], max_tokens=4)
            ids = await client.tokenize([Message("user", "hi")])
            long = await client.tokenize("x" * 5000, add_special_tokens=False)
            assert await client.detokenize([104, 105, EOS]) == "hi"
            assert await client.detokenize([EOS], skip_control_tokens=False) == "<257>"
            assert await client.detokenize([120] * 5000) == "x" * 5000
        assert text.token_ids == tuple(expected_token_ids([256, 104, 105], 4))
        assert bare.token_ids == tuple(expected_token_ids([104, 105], 4))
        assert chat.token_ids == tuple(expected_token_ids(ids, 4))
        assert long == (120,) * 5000

    run(test())


def test_special_tokens_tools_and_calls_reach_the_tokenizer() -> None:
    call = '{"name": "f"}'
    messages = [
        Message("assistant", "hi", tool_calls=[call]),
        Message("system", "7<256>", tool_call_id="x"),
    ]

    async def test() -> None:
        async with running_client(FakeEngine()) as client:
            literal = await client.tokenize("a<256>", add_special_tokens=False)
            parsed = await client.tokenize(
                "a<256>", add_special_tokens=False, parse_special_tokens=True
            )
            done = await client.complete("a<256>", max_tokens=3, parse_special_tokens=True)
            chat = await client.tokenize(
                messages, tools=['{"a": [1, null]}'], add_generation_prompt=False
            )
        assert bytes(literal) == b"a<256>"
        assert parsed == (97, 256)
        assert done.token_ids == tuple(expected_token_ids([256, 97, 256], 3))
        wanted = "[assistant]hi[system]7<256>[{'a': [1, None]}][{'name': 'f'}]$"
        assert bytes(chat[1:]).decode() == wanted

    run(test())


def test_sampling_is_the_models_own_where_a_request_says_nothing() -> None:
    default = SamplingParams(temperature=0.5, top_p=0.75, repetition_penalty=1.5)
    engine = FakeEngine()

    async def test() -> None:
        async with running_client(engine, default_sampling=default) as client:
            info = await client.model_info()
            drawn = await client.complete("a", max_tokens=2)
            await client.complete("a", max_tokens=2, temperature=1.0, seed=3, presence_penalty=1)
            greedy = await client.complete("a", max_tokens=2, temperature=0)
        said = info.default_sampling
        assert (said.temperature, said.top_p, said.repetition_penalty) == (0.5, 0.75, 1.5)
        assert (said.top_k, said.min_p, said.HasField("seed")) == (0, 0, False)
        (seed,) = drawn.started.seeds
        assert greedy.started.seeds == ()
        assert [request.sampling for request in engine.requests] == [
            replace(default, seed=seed),
            replace(default, temperature=1.0, seed=3, presence_penalty=1),
            replace(default, temperature=0),
        ]

    run(test())


def test_ends_and_biases_are_the_models_own_where_a_request_says_nothing() -> None:
    default = SamplingParams(logit_bias=((3, -100.0), (5, -100.0)))
    tokens = expected_text([256, 97], 9)
    ending = Ending(stop=(tokens[6],), min_tokens=4)
    engine = FakeEngine()

    async def test() -> None:
        defaults = {"default_sampling": default, "default_ending": ending}
        async with running_client(engine, **defaults) as client:
            said = (await client.model_info()).default_sampling
            first = await client.complete("a", max_tokens=9)
            other = await client.complete(
                "a", max_tokens=9, stop=[tokens[2]], min_tokens=0, logit_bias={5: 1.0, 7: 2.0}
            )
            await client.complete("a", max_tokens=2)
        assert dict(said.logit_bias) == dict(default.logit_bias)
        assert (list(said.stop), said.min_tokens) == ([tokens[6]], 4)
        assert (first.text, other.text) == (tokens[:6], tokens[:2])
        assert [request.min_tokens for request in engine.requests] == [4, 0, 2]
        biases = [request.sampling.logit_bias for request in engine.requests]
        assert biases[0] == default.logit_bias
        assert biases[1] == ((3, -100.0), (5, 1.0), (7, 2.0))

    run(test())


def test_a_seed_is_chosen_told_and_repeatable() -> None:
    async def test() -> None:
        async with running_client(FakeEngine()) as client:
            first = await client.complete("a", max_tokens=8, temperature=1.0)
            (seed,) = first.started.seeds
            again = await client.complete("a", max_tokens=8, temperature=1.0, seed=seed)
            other = await client.complete("a", max_tokens=8, temperature=1.0)
            largest = await client.complete("a", max_tokens=1, temperature=1.0, seed=(1 << 64) - 1)
            greedy = await client.complete("a", max_tokens=8, seed=3)
        assert again.token_ids == first.token_ids
        assert other.started.seeds != first.started.seeds
        assert largest.started.seeds == ((1 << 64) - 1,)
        assert greedy.started.seeds == ()

    run(test())


def test_default_length_is_the_rest_of_the_context_up_to_256() -> None:
    async def test() -> None:
        async with running_client(FakeEngine()) as client:
            short = await client.complete([1])
            long = await client.complete([1] * (MAX_MODEL_LEN - 7))
        assert short.started.max_tokens == len(short.token_ids) == 256
        assert long.started.max_tokens == len(long.token_ids) == 7

    run(test())


def test_model_info_tells_the_truth() -> None:
    async def test() -> None:
        async with running_client(FakeEngine()) as client:
            info = await client.model_info()
        assert (info.model_name, info.architecture, info.vocab_size) == ("fake", "llama", 258)
        assert (info.max_model_len, info.max_position_embeddings) == (512, 1024)
        assert (info.num_pages, info.page_size, info.default_max_tokens) == (64, 16, 256)
        assert (info.weights_dtype, info.kv_cache_dtype) == ("float32", "float32")
        assert {limit.name for limit in info.limits} == {*LIMITS, *CHAT_LIMITS, "message_bytes"}
        assert "SamplingParams.top_p" in info.supported_fields
        assert not any("structured_output" in name for name in info.supported_fields)
        assert list(info.eos_token_ids) == [EOS]

    run(test())


def test_load_counts_live_requests_and_pages() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.005, num_cached_tokens=4)
        async with running_client(engine) as client:
            idle = await client.load()
            events = client.generate([1] * 10, max_tokens=400)
            await anext(events)
            busy = await client.load()
            await events.aclose()
            await until(lambda: engine.stats.num_free_pages == NUM_PAGES)
        assert (idle.num_cached_tokens, idle.num_cached_pages) == (4, 3)
        assert (idle.num_live_requests, idle.num_free_pages, idle.accepting) == (0, NUM_PAGES, True)
        assert (idle.num_drafted_tokens, idle.num_accepted_tokens) == (0, 0)
        assert busy.num_drafted_tokens == 2 * busy.num_accepted_tokens > 0
        assert busy.num_live_requests == busy.num_running == 1
        assert busy.num_free_pages == NUM_PAGES - 26
        assert busy.uptime_seconds > 0

    run(test())


def test_sixteen_streams_at_once_equal_their_solo_runs() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.001)
        prompts = [[i, i + 1, i + 2] for i in range(16)]
        async with running_client(engine) as client:
            answers = await asyncio.gather(
                *(
                    client.complete(prompt, max_tokens=20 + i, temperature=1.0, seed=i)
                    for i, prompt in enumerate(prompts)
                )
            )
        for i, answer in enumerate(answers):
            assert answer.token_ids == tuple(expected_token_ids(prompts[i], 20 + i, seed=i))
        assert engine.max_running > 1
        assert len(engine.threads) == 1

    run(test())


def test_cancelling_a_stream_gives_its_pages_back() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.002)
        async with running_client(engine) as client:
            events = client.generate("abc", max_tokens=400, request_id="left")
            await anext(events)
            await anext(events)
            await events.aclose()
            await until(lambda: engine.aborted == ["left"])
            assert (await client.complete("abc", max_tokens=2, request_id="left")).text

    run(test())


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_gives_the_pages_back(stream: bool) -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.005)
        async with running_client(engine) as client:
            with pytest.raises(ServerError, match="DEADLINE_EXCEEDED"):
                await client.complete("abc", max_tokens=400, timeout=0.1, stream=stream)
            await until(lambda: len(engine.aborted) == 1)

    run(test())


def test_a_killed_channel_gives_the_pages_back() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.002)
        async with running_server(engine) as (target, _):
            channel = grpc.aio.insecure_channel(target)
            request = pb.GenerateRequest(
                text="abc", sampling=pb.SamplingParams(max_tokens=400), request_id="killed"
            )
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
            await call.read()
            await channel.close(grace=None)
            await until(lambda: engine.stats.num_free_pages == NUM_PAGES)
            assert engine.aborted == ["killed"]

    run(test())


def test_a_client_that_never_reads_holds_no_pages_and_delays_nobody() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with (
            running_server(engine) as (target, _),
            AsyncClient(target) as client,
            grpc.aio.insecure_channel(target) as channel,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = pb.GenerateRequest(text="abc", sampling=pb.SamplingParams(max_tokens=500))
            calls = [stub.Generate(request) for _ in range(4)]
            await asyncio.gather(*(call.initial_metadata() for call in calls))
            assert (await client.complete("abc", max_tokens=5)).text
            await until(lambda: engine.stats.num_free_pages == NUM_PAGES)
            for call in calls:
                call.cancel()

    run(test())


def test_initial_metadata_tells_the_request_id_while_it_is_queued() -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.gate.clear()
        async with (
            running_server(engine) as (target, _),
            AsyncClient(target) as client,
            grpc.aio.insecure_channel(target) as channel,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)
            call = stub.Generate(pb.GenerateRequest(text="abc"))
            metadata = dict(await call.initial_metadata())
            assert await client.abort(str(metadata["jaxinfer-request-id"]))
            engine.gate.set()
            events = [event.WhichOneof("event") async for event in call]
        assert events == ["started", "finished"]

    run(test())


def test_duplicate_ids_of_live_requests_are_refused() -> None:
    async def test() -> None:
        async with running_client(FakeEngine(step_seconds=0.002)) as client:
            events = client.generate("abc", max_tokens=300, request_id="twice")
            await anext(events)
            with pytest.raises(ServerError, match="twice") as raised:
                await client.complete("abc", request_id="twice")
            assert raised.value.code == "ALREADY_EXISTS"
            assert await client.abort("twice")
            rest = [event async for event in events]
            assert isinstance(rest[-1], Finished)
            assert rest[-1].reason == "abort"
            assert (await client.complete("abc", max_tokens=3, request_id="twice")).text

    run(test())


def test_abort_finishes_the_stream_and_is_idempotent() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.002)
        async with running_client(engine) as client:
            events = client.generate("abc", max_tokens=400, request_id="stop-me")
            await anext(events)
            assert await client.abort("stop-me")
            assert not await client.abort("stop-me")
            assert not await client.abort("never-seen")
            *deltas, finished = [event async for event in events]
            assert isinstance(finished, Finished)
            assert finished.reason == "abort"
            count = sum(len(delta.token_ids) for delta in deltas if isinstance(delta, Delta))
            assert finished.usage.num_output_tokens == count < 400
            with pytest.raises(ServerError, match="INVALID_ARGUMENT"):
                await client.abort("")

    run(test())


def test_more_live_requests_than_the_limit_are_refused_with_the_number() -> None:
    async def test() -> None:
        async with running_client(FakeEngine(step_seconds=0.005), max_live_requests=2) as client:
            first, second = (client.generate([i], max_tokens=400) for i in range(2))
            await anext(first)
            await anext(second)
            with pytest.raises(ServerError, match="the limit is 2") as raised:
                await client.complete("abc")
            assert raised.value.code == "RESOURCE_EXHAUSTED"
            await first.aclose()
            await second.aclose()

    run(test())
