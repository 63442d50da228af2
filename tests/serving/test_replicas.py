"""Several engines behind one front: who gets what, sums, one failure for all, draining."""

import asyncio

import pytest

from jaxinfer.request import FinishReason, Request
from serving.client import AsyncClient, Finished
from serving.loop import (
    DuplicateRequestError,
    EngineFailedError,
    EngineStuckError,
    NotServingError,
    TooManyRequestsError,
)
from serving.replicas import Replicas
from serving.request_stream import RequestStream
from serving.text.output_text import TextOptions, output_texts
from tests.serving.fakes import NUM_PAGES, ByteTokenizer, FakeEngine, expected_token_ids
from tests.serving.running import run, running_client, running_server, until

NEW_TEXT = output_texts(ByteTokenizer(), TextOptions())
# Requests for that many tokens run until they are aborted.
ENDLESS = 400


def engines(num_engines: int) -> list[FakeEngine]:
    return [FakeEngine(step_seconds=1e-3, endless_at=ENDLESS) for _ in range(num_engines)]


def request(request_id: str, max_tokens: int = ENDLESS) -> Request:
    return Request(request_id, (1,), max_tokens)


async def read_all(stream: RequestStream) -> list[int]:
    return [i async for output in stream.outputs() for i in output.output.token_ids]


def test_a_request_goes_to_the_engine_with_the_fewest_live_ones() -> None:
    async def test() -> None:
        three = engines(3)
        replicas = Replicas(three)
        streams = {i: replicas.submit(request(i), NEW_TEXT) for i in "abcde"}
        replicas.close(streams["b"])
        replicas.close(streams["e"])
        for i in "fg":
            streams[i] = replicas.submit(request(i), NEW_TEXT)
        assert replicas.num_live_requests == 5
        assert await read_all(replicas.submit(request("short", 5), NEW_TEXT)) == (
            expected_token_ids((1,), 5)
        )
        given = [[r.request_id for r in engine.requests] for engine in three]
        assert given == [["a", "d"], ["b", "e", "f", "g"], ["c", "short"]]
        assert replicas.abort("d")
        assert not replicas.abort("d")
        await replicas.drain(0.0)
        assert replicas.ended.is_set()
        assert all(engine.stats.num_free_pages == NUM_PAGES for engine in three)
        assert all(len(engine.threads) == 1 for engine in three)
        assert len({thread for engine in three for thread in engine.threads}) == 3

    run(test())


def test_limits_and_ids_are_over_all_engines() -> None:
    async def test() -> None:
        replicas = Replicas(engines(2), max_live_requests=3)
        streams = [replicas.submit(request(i), NEW_TEXT) for i in "ab"]
        for i in "ab":
            with pytest.raises(DuplicateRequestError):
                replicas.submit(request(i), NEW_TEXT)
        streams.append(replicas.submit(request("c"), NEW_TEXT))
        with pytest.raises(TooManyRequestsError, match="3 requests are live, the limit is 3"):
            replicas.check_accepts("d")
        replicas.close(streams.pop())
        with pytest.raises(TooManyRequestsError, match=r"2 .* limit is 3; this one counts as 2, "):
            replicas.submit(Request("c", (1,), 5, n=2), NEW_TEXT)
        streams.append(replicas.submit(request("d"), NEW_TEXT))
        for stream in streams:
            await stream.read()
        stats = replicas.stats
        assert (stats.num_running, stats.num_pages, stats.num_cached_pages) == (3, 2 * NUM_PAGES, 6)
        draining = asyncio.create_task(replicas.drain(0.05))
        await asyncio.sleep(0)
        assert not replicas.is_accepting
        with pytest.raises(NotServingError):
            replicas.submit(request("e"), NEW_TEXT)
        await draining
        for stream in streams:
            outputs = [output async for output in stream.outputs()]
            assert outputs[-1].output.finish_reason is FinishReason.ABORT

    run(test())


def test_one_failed_engine_is_the_end_of_all() -> None:
    async def test() -> None:
        good, bad = engines(2)
        bad.fail_after_steps = 5
        replicas = Replicas((good, bad))
        streams = [replicas.submit(request(i), NEW_TEXT) for i in "abcd"]
        for stream in streams:
            with pytest.raises(EngineFailedError):
                await read_all(stream)
        await replicas.ended.wait()
        assert not replicas.is_accepting
        with pytest.raises(EngineFailedError):
            replicas.check_accepts("late")
        with pytest.raises(EngineFailedError, match="the device is gone"):
            await replicas.drain(5.0)
        assert good.stats.num_free_pages == NUM_PAGES

    run(test())


def test_no_engine_is_refused() -> None:
    async def test() -> None:
        with pytest.raises(ValueError, match="at least 1"):
            Replicas(())

    run(test())


def test_a_server_of_two_engines() -> None:
    async def test() -> None:
        two = engines(2)
        async with running_client(*two) as client:
            info = await client.model_info()
            assert (info.num_pages, info.max_num_seqs) == (2 * NUM_PAGES, 2 * 16)
            answers = await asyncio.gather(
                *(client.complete_choices([i], max_tokens=20, n=2) for i in range(6))
            )
            for i, choices in enumerate(answers):
                for choice, answer in enumerate(choices):
                    assert list(answer.token_ids) == expected_token_ids([i], 20, choice=choice)
            load = await client.load()
            assert (load.num_pages, load.num_cached_pages) == (2 * NUM_PAGES, 6)
            assert load.num_output_tokens == 6 * 2 * 20
        assert [len(engine.requests) for engine in two] == [3, 3]

    run(test())


def test_draining_a_server_of_two_engines_finishes_what_runs_on_both() -> None:
    async def test() -> None:
        two = engines(2)
        async with running_server(*two) as (target, stop), AsyncClient(target) as client:
            calls = [asyncio.create_task(client.complete([i], max_tokens=100)) for i in range(4)]
            await until(lambda: sum(len(engine.requests) for engine in two) == 4)
            stop.set()
            for answer in await asyncio.gather(*calls):
                assert isinstance(answer.finished, Finished)
                assert answer.finished.reason == "length"

    run(test())


def test_a_failed_engine_ends_a_server_of_two() -> None:
    async def test() -> None:
        good, bad = engines(2)
        bad.fail_after_steps = 3
        async with running_server(good, bad) as (target, _), AsyncClient(target) as client:
            calls = (client.complete([i], max_tokens=ENDLESS) for i in range(2))
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert [getattr(error, "code", None) for error in errors] == ["INTERNAL", "INTERNAL"]

    with pytest.raises(EngineFailedError, match="the device is gone"):
        run(test())


def test_one_stuck_engine_fails_all() -> None:
    async def test() -> None:
        two = engines(2)
        two[1].gate.clear()
        replicas = Replicas(two, step_timeout=0.5)
        streams = [replicas.submit(request(i), NEW_TEXT) for i in "ab"]
        for stream in streams:
            with pytest.raises(EngineFailedError, match="not ended a step"):
                await read_all(stream)
        assert replicas.ended.is_set()
        assert not replicas.is_accepting
        with pytest.raises(EngineStuckError):
            await replicas.drain(0.0)
        two[1].gate.set()

    run(test())
