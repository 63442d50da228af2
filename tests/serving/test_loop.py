"""The loop without a server: streams, races, failures, draining."""

import asyncio
import gc
import threading
import weakref
from contextlib import suppress

import pytest

from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import RequestOutput
from serving.loop import (
    DuplicateRequestError,
    EngineFailedError,
    EngineLoop,
    EngineStuckError,
    NotServingError,
    RequestRefusedError,
    TooManyRequestsError,
)
from serving.request_stream import RequestStream, TextOutput
from serving.text.output_text import TextOptions, output_texts
from tests.patience import HANG_SECONDS
from tests.serving.fakes import NUM_PAGES, ByteTokenizer, FakeEngine, expected_token_ids
from tests.serving.running import run, until


def request(request_id: str = "r", max_tokens: int = 5, prompt: tuple[int, ...] = (1,)) -> Request:
    return Request(request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens)


NEW_TEXT = output_texts(ByteTokenizer(), TextOptions())


async def read_all(stream: RequestStream) -> list[TextOutput]:
    return [output async for output in stream.outputs()]


def all_token_ids(outputs: list[TextOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.output.token_ids]


def test_a_reader_that_is_slow_gets_merged_outputs_and_loses_nothing() -> None:
    async def test() -> None:
        # Slow enough that the first output is read long before the last is there.
        engine = FakeEngine(step_seconds=2e-3)
        loop = EngineLoop(engine)
        slow = loop.submit(request("slow", 300), NEW_TEXT)
        first = await slow.read()
        await until(lambda: slow.is_finished)
        rest = await read_all(slow)
        assert len(rest) == 1
        assert all_token_ids([first, *rest]) == expected_token_ids((1,), 300)
        assert rest[-1].output.num_output_tokens == 300
        loop.close(slow)
        await loop.drain(1.0)
        assert engine.aborted == []

    run(test())


def test_an_idle_loop_waits_without_stepping() -> None:
    async def test() -> None:
        engine = FakeEngine()
        loop = EngineLoop(engine)
        await read_all(loop.submit(request("a", 4), NEW_TEXT))
        steps = engine.num_steps
        await asyncio.sleep(0.05)
        assert engine.num_steps == steps == 4
        await read_all(loop.submit(request("b", 4), NEW_TEXT))
        await loop.drain(1.0)

    run(test())


def test_a_refusal_fails_that_stream_only() -> None:
    async def test() -> None:
        loop = EngineLoop(FakeEngine(step_seconds=0.001))
        good = loop.submit(request("good", 50), NEW_TEXT)
        bad = loop.submit(request("bad", prompt=(255,)), NEW_TEXT)
        with pytest.raises(RequestRefusedError, match="starts with 255"):
            await bad.read()
        assert len(all_token_ids(await read_all(good))) == 50
        assert loop.num_live_requests == 0
        await loop.drain(1.0)

    run(test())


def test_a_request_counts_as_many_times_as_it_has_choices() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.001)
        loop = EngineLoop(engine, max_live_requests=4)
        first = loop.submit(Request("a", (1,), 400, n=3), NEW_TEXT)
        assert loop.num_live_requests == 3
        loop.check_accepts("b")
        with pytest.raises(TooManyRequestsError, match=r"^3 .* limit is 4; this one counts as 2, "):
            loop.submit(Request("b", (1,), 400, n=2), NEW_TEXT)
        second = loop.submit(request("b", 400), NEW_TEXT)
        with pytest.raises(TooManyRequestsError, match=r"^4 requests are live, the limit is 4$"):
            loop.submit(request("c"), NEW_TEXT)
        loop.close(first)
        assert loop.num_live_requests == 1
        loop.close(second)
        with pytest.raises(TooManyRequestsError, match=r"^0 .* limit is 4; this one counts as 5, "):
            loop.submit(Request("d", (1,), 400, n=5), NEW_TEXT)
        await loop.drain(1.0)
        assert engine.stats.num_free_pages == NUM_PAGES

    run(test())


def test_ids_and_numbers_of_live_requests_are_bounded() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.001)
        loop = EngineLoop(engine, max_live_requests=2)
        first = loop.submit(request("a", 400), NEW_TEXT)
        with pytest.raises(DuplicateRequestError):
            loop.submit(request("a"), NEW_TEXT)
        second = loop.submit(request("b", 400), NEW_TEXT)
        with pytest.raises(TooManyRequestsError, match="the limit is 2"):
            loop.submit(request("c"), NEW_TEXT)
        loop.close(first)
        # The id is free at once, and the new request is not hit by the old one's abort.
        again = loop.submit(request("a", 3), NEW_TEXT)
        assert all_token_ids(await read_all(again)) == expected_token_ids((1,), 3)
        loop.close(second)
        await loop.drain(1.0)
        assert engine.stats.num_free_pages == NUM_PAGES

    run(test())


def test_closing_and_aborting_at_any_time_is_harmless() -> None:
    async def test() -> None:
        engine = FakeEngine()
        loop = EngineLoop(engine)
        for i in range(60):
            # The same id again and again, ended at ever later moments around its own finish.
            stream = loop.submit(request("same", 1 + i % 5), NEW_TEXT)
            for _ in range(i % 7):
                await asyncio.sleep(0)
            if i % 2:
                loop.abort("same")
                outputs = await read_all(stream)
                assert outputs[-1].output.num_output_tokens == len(all_token_ids(outputs))
            loop.close(stream)
            loop.close(stream)
        assert all_token_ids(await read_all(loop.submit(request("same", 9), NEW_TEXT))) == (
            expected_token_ids((1,), 9)
        )
        await loop.drain(1.0)
        assert engine.stats.num_free_pages == NUM_PAGES

    run(test())


def test_a_failing_engine_fails_every_stream_and_is_noticed() -> None:
    async def test() -> None:
        loop = EngineLoop(FakeEngine(fail_after_steps=3))
        streams = [loop.submit(request(str(i), 100), NEW_TEXT) for i in range(4)]
        for stream in streams:
            with pytest.raises(EngineFailedError):
                await read_all(stream)
        await loop.ended.wait()
        assert not loop.is_accepting
        with pytest.raises(EngineFailedError):
            loop.submit(request("late"), NEW_TEXT)
        with pytest.raises(EngineFailedError, match="the device is gone"):
            await loop.drain(5.0)

    run(test())


def test_an_engine_that_forgets_a_request_is_a_failed_engine() -> None:
    async def test() -> None:
        loop = EngineLoop(FakeEngine(lost=("gone",)))
        with pytest.raises(EngineFailedError):
            await read_all(loop.submit(request("gone"), NEW_TEXT))
        with pytest.raises(EngineFailedError, match="lost"):
            await loop.drain(5.0)

    run(test())


def test_draining_lets_short_requests_finish_and_aborts_long_ones() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.005)
        loop = EngineLoop(engine)
        short, long = (
            loop.submit(request("short", 5), NEW_TEXT),
            loop.submit(request("long", 400), NEW_TEXT),
        )
        draining = asyncio.create_task(loop.drain(0.3))
        await asyncio.sleep(0)
        with pytest.raises(NotServingError):
            loop.submit(request("late"), NEW_TEXT)
        await draining
        assert (await read_all(short))[-1].output.finish_reason is FinishReason.LENGTH
        outputs = await read_all(long)
        assert outputs[-1].output.finish_reason is FinishReason.ABORT
        assert outputs[-1].output.num_output_tokens == len(all_token_ids(outputs)) < 400
        assert engine.stats.num_free_pages == NUM_PAGES

    run(test())


def test_draining_an_engine_that_hangs_ends() -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.gate.clear()
        loop = EngineLoop(engine)
        stream = loop.submit(request(), NEW_TEXT)
        with pytest.raises(EngineFailedError, match="did not end its step"):
            await loop.drain(0.02, stop_seconds=0.02)
        assert (await read_all(stream))[-1].output.finish_reason is FinishReason.ABORT
        engine.gate.set()
        await loop.ended.wait()

    run(test())


class StuckText:
    """The text of a choice that is never made."""

    def __init__(self, release: threading.Event) -> None:
        self._release = release

    def add(self, output: RequestOutput) -> TextOutput:
        assert self._release.wait(timeout=HANG_SECONDS)
        return TextOutput(output)


class StuckAddEngine(FakeEngine):
    """Takes no request while the gate is closed."""

    def add(self, request: Request) -> None:
        assert self.gate.wait(timeout=HANG_SECONDS)
        super().add(request)


@pytest.mark.parametrize("where", ["step", "add", "text"])
def test_a_turn_that_does_not_end_fails_the_streams_and_is_noticed(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        engine = StuckAddEngine() if where == "add" else FakeEngine()
        release, ends = threading.Event(), list[BaseException | None]()
        if where != "text":
            engine.gate.clear()
        loop = EngineLoop(engine, step_timeout=0.05, on_end=ends.append)
        new_text = (lambda: StuckText(release)) if where == "text" else NEW_TEXT
        streams = [loop.submit(request(str(i)), new_text) for i in range(3)]
        for stream in streams:
            with pytest.raises(EngineFailedError, match=r"step in 0\.05 s .* going down"):
                await stream.read()
        await loop.ended.wait()
        assert not loop.is_accepting
        assert loop.num_live_requests == 0
        with pytest.raises(EngineFailedError, match="has failed"):
            loop.submit(request("late"), NEW_TEXT)
        with pytest.raises(EngineStuckError, match=r"step in 0\.05 s"):
            await loop.drain(HANG_SECONDS, stop_seconds=HANG_SECONDS)
        # Coming back changes nothing any more, and the thread ends.
        engine.gate.set()
        release.set()
        await until(lambda: not loop._thread.is_alive())
        await asyncio.sleep(0)
        assert len(ends) == 1

    run(test())
    assert "its thread is here" in caplog.text
    assert "gate.wait" in caplog.text or where == "text"


def test_waiting_for_work_is_no_step() -> None:
    async def test() -> None:
        loop = EngineLoop(FakeEngine(step_seconds=0.0), step_timeout=0.02)
        await asyncio.sleep(0.2)
        assert loop.is_accepting
        with suppress(EngineStuckError):  # of a machine that gives the last turn no time
            await loop.drain(1.0)

    run(test())


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_step_timeout_is_positive(timeout: float) -> None:
    async def test() -> None:
        with pytest.raises(ValueError, match="step_timeout must be more than 0 s"):
            EngineLoop(FakeEngine(), step_timeout=timeout)

    run(test())


def test_finished_requests_are_not_kept() -> None:
    async def test() -> None:
        loop = EngineLoop(FakeEngine())
        stream = loop.submit(request(), NEW_TEXT)
        await read_all(stream)
        reference = weakref.ref(stream)
        del stream
        await read_all(loop.submit(request(), NEW_TEXT))
        gc.collect()
        assert reference() is None
        await loop.drain(1.0)

    run(test())
