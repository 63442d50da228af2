"""Options of a client arrive where they belong: at the engine, or in the prompt."""

from dataclasses import replace

import pytest

from jaxinfer.request import Request
from serving.client import Message
from serving.message_size import MAX_MESSAGE_BYTES
from tests.serving.fakes import FakeEngine, expected_token_ids
from tests.serving.running import run, running_client


def test_everything_asked_for_reaches_the_engine() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with running_client(engine) as client:
            await client.complete_choices(
                "x",
                model="fake",
                priority=-7,
                cache_salt="mine",
                temperature=0.5,
                top_k=4,
                top_p=0.5,
                min_p=0.25,
                repetition_penalty=1.5,
                presence_penalty=-1.0,
                frequency_penalty=2.0,
                logit_bias={9: 1.5, 3: -100.0},
                seed=11,
                max_tokens=9,
                min_tokens=2,
                stop_token_ids=[5, 4, 5],
                ignore_eos=True,
                n=2,
                logprobs=3,
                prompt_logprobs=0,
            )
            await client.complete("x", max_tokens=3)
        asked, plain = engine.requests
        assert asked == replace(
            asked,
            n=2,
            priority=-7,
            cache_salt="mine",
            max_tokens=9,
            min_tokens=2,
            stop_token_ids=(5, 4, 5),
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=0,
        )
        sampling = asked.sampling
        assert sampling == replace(
            sampling,
            temperature=0.5,
            top_k=4,
            top_p=0.5,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-1.0,
            frequency_penalty=2.0,
            logit_bias=((3, -100.0), (9, 1.5)),
            seed=11,
        )
        assert plain == Request(
            plain.request_id, plain.prompt_token_ids, 3, eos_token_ids=plain.eos_token_ids
        )

    run(test())


def test_chats_as_they_are_asked_for() -> None:
    async def test() -> None:
        messages = [Message("user", "hi", name="Ada"), Message("assistant", "I")]
        async with running_client(FakeEngine()) as client:

            async def rendered(**options) -> str:
                return await client.detokenize(await client.tokenize(messages, **options))

            assert await rendered() == "[user(Ada)]hi[assistant]I$[a]"
            assert await rendered(add_generation_prompt=False) == "[user(Ada)]hi[assistant]I$"
            assert await rendered(continue_final_message=True) == "[user(Ada)]hi[assistant]I"
            arguments = {"b": "true", "c": "True", "d": "false"}
            assert (await rendered(template_arguments=arguments)).startswith(
                "b=True;c='True';d=False;[user"
            )
            ids = await client.tokenize(messages, continue_final_message=True)
            done = await client.complete(messages, max_tokens=3, continue_final_message=True)
            assert list(done.token_ids) == expected_token_ids(ids, 3)
            for prompt in ("text", [1, 2]):
                with pytest.raises(ValueError, match="for a prompt of messages"):
                    await client.complete(prompt, add_generation_prompt=False)
            with pytest.raises(ValueError, match="stop must be a list or its like, got 'abc'"):
                await client.complete("x", stop="abc")

    run(test())


def test_a_request_that_no_server_reads_is_refused_by_the_client() -> None:
    async def test() -> None:
        async with running_client(FakeEngine()) as client:
            size = (
                f"the request has {MAX_MESSAGE_BYTES + 5} bytes, the limit is {MAX_MESSAGE_BYTES}"
            )
            with pytest.raises(ValueError, match=size):
                await client.complete("x" * MAX_MESSAGE_BYTES)
            with pytest.raises(ValueError, match=size):
                await client.tokenize("x" * MAX_MESSAGE_BYTES)
            with pytest.raises(ValueError, match="the limit is"):
                await client.detokenize([1] * MAX_MESSAGE_BYTES)

    run(test())
