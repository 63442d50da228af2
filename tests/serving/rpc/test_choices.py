"""Several choices in one request: interleaved, merged, ended one by one, given back."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from jaxinfer.request import FinishReason, Request
from jaxinfer.schedule import RequestOutput
from serving.client import Delta, Finished, Started
from serving.loop import EngineLoop
from serving.request_stream import RequestStream, TextOutput
from serving.text.output_text import OutputText, TextOptions, output_texts
from tests.serving.fakes import (
    NUM_PAGES,
    ByteTokenizer,
    FakeEngine,
    expected_logprobs,
    expected_text,
    expected_token_ids,
)
from tests.serving.running import run, running_client, until

PROMPT = (1,)


def request(n: int, max_tokens: int = 8, request_id: str = "r") -> Request:
    return Request(request_id, PROMPT, max_tokens, n=n)


def new_texts(*stop: str) -> Callable[[], OutputText]:
    return output_texts(ByteTokenizer(), TextOptions(stop))


def by_choice(outputs: list[TextOutput]) -> dict[int, list[TextOutput]]:
    choices: dict[int, list[TextOutput]] = {}
    for output in outputs:
        choices.setdefault(output.output.choice, []).append(output)
    return choices


def token_ids(outputs: list[TextOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.output.token_ids]


@pytest.mark.parametrize("pause", [0.0, 0.003, 0.05])
def test_readers_of_any_pace_get_every_token_of_every_choice_in_order(pause: float) -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=1e-3)
        loop = EngineLoop(engine)
        streams = [loop.submit(request(4, 60, str(i)), new_texts()) for i in range(3)]

        async def read(stream: RequestStream, pause: float) -> list[TextOutput]:
            outputs = []
            async for output in stream.outputs():
                outputs.append(output)
                await asyncio.sleep(pause)
            return outputs

        # One reader keeps up, the others have the pause.
        results = await asyncio.gather(
            *(read(stream, pause if i else 0.0) for i, stream in enumerate(streams))
        )
        for outputs in results:
            assert outputs[0].output.choice == 0
            choices = by_choice(outputs)
            assert sorted(choices) == [0, 1, 2, 3]
            for choice, of_choice in choices.items():
                assert token_ids(of_choice) == expected_token_ids(PROMPT, 60, choice=choice)
                text = "".join(output.text for output in of_choice)
                assert text == expected_text(PROMPT, 60, choice)
                reasons = [output.output.finish_reason for output in of_choice]
                assert reasons == [None] * (len(reasons) - 1) + [FinishReason.LENGTH]
                assert of_choice[-1].output.num_output_tokens == 60
        if pause == 0.05:
            assert len(results[1]) < 4 * 60
        await loop.drain(1.0)
        assert engine.aborted == engine.aborted_choices == []

    run(test())


def output(choice: int, *token_ids: int, reason: FinishReason | None = None) -> TextOutput:
    logprobs = tuple(x for token_id in token_ids for x in expected_logprobs(token_id, 0, 1))
    told = RequestOutput("r", token_ids, reason, choice=choice, logprobs=logprobs)
    return TextOutput(told, bytes(token_ids).decode())


def test_missed_outputs_are_merged_and_choice_0_comes_first() -> None:
    async def test() -> None:
        stream = RequestStream(request(3))
        first = output(0, 97)
        first = replace(first, output=replace(first.output, prompt_logprobs=(None,)))
        stream.put(output(2, 110))
        stream.put(output(2, 111, 112))
        reading = asyncio.create_task(stream.read())
        await asyncio.sleep(0)
        assert not reading.done()  # what holds for all choices comes with choice 0
        stream.put(first)
        stream.put(output(0, 98, reason=FinishReason.STOP))
        told = await reading
        assert (told.output.token_ids, told.text) == ((97, 98), "ab")
        assert told.output.prompt_logprobs == (None,)
        assert [entry.token_id for entry in told.output.logprobs] == [97, 98]
        assert told.output.finish_reason is FinishReason.STOP
        stream.put(output(1, 120))
        stream.put(output(2, 113))
        stream.put(output(0, 99))  # late: it has ended
        # The choice that has waited longest comes first.
        assert [(await stream.read()).text for _ in range(2)] == ["nopq", "x"]
        stream.abort()
        assert stream.is_finished
        rest = [told async for told in stream.outputs()]
        assert [(told.output.choice, told.output.finish_reason) for told in rest] == [
            (1, FinishReason.ABORT),
            (2, FinishReason.ABORT),
        ]

    run(test())


def test_an_aborted_choice_is_owed_the_text_that_was_held() -> None:
    async def test() -> None:
        loop = EngineLoop(FakeEngine(script=list(b"xab"), step_seconds=0.005, endless_at=400))
        stream = loop.submit(request(1, 400), new_texts("abz"))
        told = [await stream.read()]
        while sum(len(output.output.token_ids) for output in told) < 3:
            told.append(await stream.read())
        loop.abort("r")
        told += [output async for output in stream.outputs()]
        text = "".join(output.text for output in told)
        assert text == bytes(token_ids(told)).decode()
        await loop.drain(1.0)

    run(test())


@pytest.mark.parametrize("late", [0, 1, 3])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_stop_string_ends_its_choice_in_the_engine_and_no_other(
    late: int, num_tokens: int
) -> None:
    async def test() -> None:
        engine = FakeEngine(late=late, num_tokens=num_tokens)
        loop = EngineLoop(engine)
        # Of the four choices' letters only choice 2 has these within its first tokens.
        whole = [expected_text(PROMPT, 12, choice) for choice in range(4)]
        stop = whole[2][4:6]
        assert [stop in text for text in whole] == [False, False, True, False]
        stream = loop.submit(request(4, 12), new_texts(stop))
        choices = by_choice([told async for told in stream.outputs()])
        for choice, outputs in choices.items():
            text, last = "".join(told.text for told in outputs), outputs[-1]
            if choice == 2:
                assert (text, last.stop_string) == (whole[2][:4], stop)
                assert token_ids(outputs) == expected_token_ids(PROMPT, 6, choice=2)
                assert last.output.finish_reason is FinishReason.STOP
                assert last.output.num_output_tokens == 6
            else:
                assert (text, last.stop_string) == (whole[choice], None)
                assert last.output.finish_reason is FinishReason.LENGTH
        assert engine.aborted == []
        assert engine.aborted_choices == [("r", 2)]
        await loop.drain(1.0)
        assert engine.stats.num_free_pages == NUM_PAGES

    run(test())


def test_a_stop_costs_no_step_of_an_engine_that_tells_at_once() -> None:
    async def test() -> None:
        engine = FakeEngine()
        loop = EngineLoop(engine)
        text = expected_text(PROMPT, 50)
        stream = loop.submit(request(1, 50), new_texts(text[9]))
        assert "".join([told.text async for told in stream.outputs()]) == text[:9]
        await loop.drain(1.0)
        assert engine.num_steps == 10

    run(test())


def test_an_engine_that_tells_later_is_waited_for() -> None:
    async def test() -> None:
        loop = EngineLoop(FakeEngine(late=3))
        stream = loop.submit(request(2, 5), new_texts())
        choices = by_choice([told async for told in stream.outputs()])
        for choice in range(2):
            assert token_ids(choices[choice]) == expected_token_ids(PROMPT, 5, choice=choice)
        await loop.drain(1.0)

    run(test())


def test_the_client_sees_choices_side_by_side() -> None:
    async def test() -> None:
        # Slow enough that a reader on a busy machine does not find everything merged.
        engine = FakeEngine(step_seconds=5e-3)
        async with running_client(engine) as client:
            options = {"max_tokens": 20, "n": 4, "temperature": 1.0, "seed": 9}
            events = [event async for event in client.generate(list(PROMPT), **options)]
            streamed = await client.complete_choices(list(PROMPT), **options)
            whole = await client.complete_choices(list(PROMPT), stream=False, **options)
            kinds = [type(e) async for e in client.generate([1], n=3, max_tokens=5, stream=False)]
            with pytest.raises(ValueError, match="n is 4: complete_choices"):
                await client.complete(list(PROMPT), **options)
        assert isinstance(events[0], Started)
        assert events[0].seeds == (9,)
        assert [type(event) for event in events].count(Finished) == 4
        order = [event.choice for event in events if isinstance(event, Delta)]
        assert order != sorted(order)
        assert kinds == [Started, *[Delta, Finished] * 3]
        for choice, (a, b) in enumerate(zip(streamed, whole, strict=True)):
            assert (a.text, a.token_ids) == (b.text, b.token_ids)
            assert list(a.token_ids) == expected_token_ids(PROMPT, 20, seed=9, choice=choice)
            assert a.finished.choice == choice
            assert a.finished.usage.num_output_tokens == 20
            assert a.finished.usage.num_prompt_tokens == 1
            assert a.finished.timings.time_to_first_token_seconds is not None

    run(test())


@pytest.mark.parametrize("stream", [True, False])
def test_stop_strings_tokens_and_min_tokens_end_choices(stream: bool) -> None:
    async def test() -> None:
        text = expected_text(PROMPT, 60)
        async with running_client(FakeEngine()) as client:
            options = {"max_tokens": 60, "stream": stream}

            async def complete(**more):
                return await client.complete(list(PROMPT), **options, **more)

            by_string = await complete(stop=[text[4:6], "?"])
            included = await complete(stop=[text[4:6]], include_stop_in_output=True)
            by_token = await complete(stop_token_ids=[ord(text[5])])
            with_token = await complete(stop_token_ids=[ord(text[5])], include_stop_in_output=True)
            # The letters repeat every 26 tokens.
            later = await complete(stop=[text[4:6]], min_tokens=6)
            straddling = await complete(stop=[text[4:6]], min_tokens=5)
        assert (by_string.text, by_string.finished.stop_string) == (text[:4], text[4:6])
        assert (by_string.finished.reason, by_string.finished.stop_token_id) == ("stop", None)
        assert len(by_string.token_ids) == by_string.finished.usage.num_output_tokens == 6
        assert (included.text, included.finished.stop_string) == (text[:6], text[4:6])
        assert (by_token.text, by_token.finished.stop_token_id) == (text[:5], ord(text[5]))
        assert by_token.finished.stop_string is None
        assert len(by_token.token_ids) == 6
        assert with_token.text == text[:6]
        assert later.text == text[:30]
        assert straddling.text == text[:4]

    run(test())


def test_logprobs_go_with_their_tokens() -> None:
    async def test() -> None:
        async with running_client(FakeEngine(num_cached_tokens=1)) as client:
            choices = await client.complete_choices(
                [97, 256, 99], n=2, max_tokens=6, logprobs=2, prompt_logprobs=1, stop=["zzz"]
            )
            none = await client.complete([97, 98], max_tokens=2)
            zero = await client.complete([97, 98], max_tokens=2, logprobs=0, prompt_logprobs=0)
        for choice, done in enumerate(choices):
            assert [entry.token_id for entry in done.logprobs] == list(done.token_ids)
            assert [entry.logprob for entry in done.logprobs] == [-0.5 * i for i in range(6)]
            entry = done.logprobs[1]
            assert entry.rank == 1
            assert [(top.token_id, top.logprob) for top in entry.top] == [
                (entry.token_id, -0.5),
                (entry.token_id + 1, -1.5),
            ]
            assert entry.top[0].token == bytes((entry.token_id,))
            assert done.finished.choice == choice
        prompt = choices[0].started.prompt_logprobs
        assert prompt[0] is None
        assert [entry.token_id for entry in prompt[1:] if entry] == [256, 99]
        # A control token has bytes here, whatever the text leaves out.
        assert prompt[1] is not None
        assert prompt[1].top[0].token == b"<256>"
        assert (none.logprobs, none.started.prompt_logprobs) == ((), ())
        assert [entry.top for entry in zero.logprobs] == [(), ()]
        assert len(zero.started.prompt_logprobs) == 2

    run(test())


def test_cancelling_ends_every_choice() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.002)
        async with running_client(engine) as client:
            events = client.generate(list(PROMPT), n=4, max_tokens=100, request_id="left")
            await anext(events)
            await anext(events)
            assert (await client.load()).num_running == 4
            await events.aclose()
            await until(lambda: engine.aborted == ["left"])
            assert engine.stats.num_running == 0

    run(test())


def test_abort_finishes_every_choice_that_still_runs() -> None:
    async def test() -> None:
        engine = FakeEngine(step_seconds=0.002)
        stop = expected_text(PROMPT, 3, choice=1)[1:]
        async with running_client(engine) as client:
            events = client.generate(list(PROMPT), n=3, max_tokens=250, request_id="a", stop=[stop])
            reasons = {}
            async for event in events:
                if isinstance(event, Finished):
                    if not reasons:
                        assert await client.abort("a")
                    reasons[event.choice] = event.reason
        assert reasons == {1: "stop", 0: "abort", 2: "abort"}

    run(test())
