"""Every field of the schema is either served or refused by name; generated from the descriptor."""

import re
from collections.abc import Iterator
from math import inf, nan
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from jaxinfer.request import SamplingParams
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.rpc.validate import (
    SUPPORTED_FIELDS,
    check_generation,
    check_prompt,
    refuse_unsupported,
    sampling_params,
    text_options,
)
from serving.text.output_text import TextOptions

REQUESTS = [method.input_type for method in pb.DESCRIPTOR.services_by_name["Inference"].methods]

EXAMPLES = {
    FieldDescriptor.CPPTYPE_STRING: "example",
    FieldDescriptor.CPPTYPE_BOOL: True,
    FieldDescriptor.CPPTYPE_DOUBLE: 0.5,
}


def reachable(descriptor: Descriptor) -> Iterator[tuple[Descriptor, FieldDescriptor]]:
    """All fields of a request, and of the messages in it, each with its message."""
    for field in descriptor.fields:
        yield descriptor, field
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from reachable(field.message_type)


FIELDS = {
    f"{owner.name}.{field.name}": (owner, field)
    for request in REQUESTS
    for owner, field in reachable(request)
}


def new_message(descriptor: Descriptor) -> Message:
    return getattr(pb, descriptor.name)()


def set_field(message: Message, field: FieldDescriptor, value: object = None) -> None:
    """Sets a field to ``value``, or to an example."""
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        key = EXAMPLES.get(kind.fields_by_name["key"].cpp_type, 1)
        getattr(message, field.name)[key] = EXAMPLES[kind.fields_by_name["value"].cpp_type]
        return
    if kind is not None:
        target = getattr(message, field.name)
        target.add() if field.is_repeated else target.SetInParent()
        return
    if value is None:
        value = EXAMPLES.get(field.cpp_type, 3)
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def test_the_tables_name_existing_fields() -> None:
    supported = {f"{m}.{f}" for m, fields in SUPPORTED_FIELDS.items() for f in fields}
    assert supported <= FIELDS.keys()
    # Everything that is declared is served, but for structured output.
    assert FIELDS.keys() - supported == {
        "SamplingParams.structured_output",
        *(f"StructuredOutput.{name}" for name in ("json_schema", "regex", "grammar", "choice")),
        "Choices.strings",
    }


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_is_served_or_refused_by_name(name: str) -> None:
    owner, field = FIELDS[name]
    message = new_message(owner)
    set_field(message, field)
    if field.name in SUPPORTED_FIELDS.get(owner.name, frozenset()):
        refuse_unsupported(message)
    else:
        with pytest.raises(ValueError, match=rf"^{field.name} is not supported yet$"):
            refuse_unsupported(message)


NEUTRAL_VALUES = {
    "GenerateRequest.priority": 0,
    "GenerateRequest.cache_salt": "",
    "GenerateRequest.model": "",
    "SamplingParams.temperature": 0.0,
    "SamplingParams.top_k": 0,
    "SamplingParams.top_p": 1.0,
    "SamplingParams.min_p": 0.0,
    "SamplingParams.repetition_penalty": 1.0,
    "SamplingParams.presence_penalty": 0.0,
    "SamplingParams.frequency_penalty": 0.0,
    "SamplingParams.seed": 0,
    "SamplingParams.min_tokens": 0,
    "SamplingParams.include_stop_in_output": False,
    "SamplingParams.n": 1,
    "SamplingParams.skip_control_tokens": True,
    "Chat.add_generation_prompt": True,
    "Chat.continue_final_message": False,
}


@pytest.mark.parametrize(("name", "value"), NEUTRAL_VALUES.items())
def test_neutral_values_say_nothing(name: str, value: object) -> None:
    owner, field = FIELDS[name]
    message = new_message(owner)
    set_field(message, field, value)
    refuse_unsupported(message)
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")]))
    targets: tuple[Message, ...] = (request, request.sampling, request.chat)
    for target in targets:
        if target.DESCRIPTOR is owner:
            target.MergeFromString(message.SerializeToString())
    check_prompt(request, has_chat_template=True)
    check_generation(request, "fake")
    assert sampling_params(request.sampling) == SamplingParams()
    assert text_options(request.sampling) == TextOptions()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("priority", 101, "priority must be in [-100, 100], got 101"),
        ("priority", -(1 << 31), "priority must be in"),
        ("cache_salt", "s" * 129, "characters of cache_salt must be in [0, 128], got 129"),
        ("model", "other", "model must be 'fake', which is served, got 'other'"),
    ],
)
def test_values_of_a_request_are_checked(field: str, value: object, says: str) -> None:
    request = pb.GenerateRequest(text="a")
    setattr(request, field, value)
    with pytest.raises(ValueError, match=re.escape(says)):
        check_generation(request, "fake")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n": 0}, "n must be in [1, 16], got 0"),
        ({"n": 17}, "n must be in [1, 16], got 17"),
        ({"n": -1}, "n must be in"),
        ({"logprobs": 21}, "logprobs must be in [0, 20], got 21"),
        ({"logprobs": -1}, "logprobs must be in"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be in [0, 20], got 21"),
        ({"min_tokens": -1}, "min_tokens must be in"),
        ({"max_tokens": 0}, "max_tokens must be in [1, 1048576], got 0"),
        ({"stop": ["x"] * 17}, "number of stop must be in [0, 16], got 17"),
        ({"stop": ["x", ""]}, "characters of stop[1] must be in [1, 256], got 0"),
        ({"stop": ["x" * 257]}, "characters of stop[0] must be in [1, 256], got 257"),
        ({"stop_token_ids": [1] * 33}, "number of stop_token_ids must be in [0, 32], got 33"),
        ({"min_p": nan}, "min_p must be in [0.0, 1.0], got nan"),
        ({"min_p": 1.5}, "min_p must be in [0.0, 1.0], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be in [0.001, 100.0], got 0.0"),
        ({"repetition_penalty": inf}, "repetition_penalty must be in [0.001, 100.0], got inf"),
        ({"presence_penalty": -2.5}, "presence_penalty must be in [-2.0, 2.0], got -2.5"),
        ({"frequency_penalty": nan}, "frequency_penalty must be in [-2.0, 2.0], got nan"),
        ({"logit_bias": {5: nan}}, "logit_bias of token 5 must be in [-100.0, 100.0], got nan"),
        ({"logit_bias": {5: -101}}, "logit_bias of token 5 must be in [-100.0, 100.0], got -101"),
        (
            {"logit_bias": dict.fromkeys(range(100_000), 0.0)},
            "number of logit_bias must be in [0, 300], got 100000",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_of_sampling_are_checked(fields: dict[str, Any], says: str) -> None:
    request = pb.GenerateRequest(text="a", sampling=pb.SamplingParams(**fields))

    def check() -> None:
        check_generation(request, "fake")
        sampling_params(request.sampling)

    with pytest.raises(ValueError, match=re.escape(says)):
        check()


def test_both_ends_of_every_range_are_taken() -> None:
    for end, sign in ((0, -1), (1, 1)):
        sampling = pb.SamplingParams(
            min_p=end,
            repetition_penalty=(0.001, 100)[end],
            presence_penalty=2 * sign,
            frequency_penalty=2 * sign,
            logit_bias=dict.fromkeys(range((0, 300)[end]), 100 * sign),
            max_tokens=(1, 1 << 20)[end],
            min_tokens=end,
            stop=["s" * 256] * (0, 16)[end],
            stop_token_ids=[7] * (0, 32)[end],
            n=(1, 16)[end],
            logprobs=20 * end,
            prompt_logprobs=20 * end,
        )
        request = pb.GenerateRequest(
            text="a", sampling=sampling, priority=100 * sign, cache_salt="s" * 128 * end
        )
        check_generation(request, "fake")
        params = sampling_params(request.sampling)
        assert params.presence_penalty == 2 * sign
        assert len(params.logit_bias) == (0, 300)[end]


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        (pb.Chat(add_generation_prompt=True, continue_final_message=True), "exclude each other"),
        (pb.Chat(template_arguments={str(i): "" for i in range(33)}), "in [0, 32], got 33"),
        (pb.Chat(template_arguments={"": "x"}), "a name in template_arguments must be in [1, 64]"),
        (pb.Chat(template_arguments={"x" * 65: "x"}), "must be in [1, 64], got 65"),
        (pb.Chat(template_arguments={"x": "y" * (4 << 20)}), "characters of the prompt"),
        (pb.Chat(messages=[pb.ChatMessage(role="r", name="")]), "messages[1].name must be in [1"),
        (pb.Chat(messages=[pb.ChatMessage(role="r", name="n" * 65)]), "in [1, 64], got 65"),
    ],
    ids=lambda value: str(value)[:30].replace("\n", " "),
)
def test_values_of_a_chat_are_checked(chat: pb.Chat, says: str) -> None:
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")]))
    request.chat.MergeFrom(chat)
    with pytest.raises(ValueError, match=re.escape(says)):
        check_prompt(request, has_chat_template=True)


def test_refusals_name_the_path() -> None:
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="a"), pb.ChatMessage(role="b")])
    )
    with pytest.MonkeyPatch.context() as patch:
        older = {**SUPPORTED_FIELDS, "ChatMessage": frozenset(("role",))}
        patch.setattr("serving.rpc.validate.SUPPORTED_FIELDS", older)
        request.chat.messages[1].name = "c"
        with pytest.raises(ValueError, match=r"^chat\.messages\[1\]\.name is not supported yet"):
            refuse_unsupported(request)
    request = pb.GenerateRequest(sampling=pb.SamplingParams(structured_output={}))
    with pytest.raises(ValueError, match=r"^sampling\.structured_output is not"):
        refuse_unsupported(request)


@pytest.mark.parametrize("descriptor", REQUESTS, ids=lambda descriptor: descriptor.name)
def test_fields_of_a_newer_schema_are_refused(descriptor: Descriptor) -> None:
    field_2000_is_1 = b"\x80\x7d\x01"
    message = new_message(descriptor)
    message.ParseFromString(field_2000_is_1)
    with pytest.raises(ValueError, match="field number 2000"):
        refuse_unsupported(message)


def test_unknown_fields_deep_inside_are_refused() -> None:
    request = pb.GenerateRequest()
    request.chat.messages.add().ParseFromString(b"\x80\x7d\x01")
    with pytest.raises(ValueError, match="ChatMessage has no field number 2000"):
        refuse_unsupported(request)


def test_messages_are_counted_before_they_are_walked() -> None:
    request = pb.GenerateRequest.FromString(
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 200_000)).SerializeToString()
    )
    with pytest.raises(ValueError, match=r"number of chat\.messages"):
        refuse_unsupported(request)


def test_defaults_of_sampling() -> None:
    greedy = sampling_params(pb.SamplingParams())
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.seed) == (0.0, 0, 1.0, 0)
    seeds = {sampling_params(pb.SamplingParams(temperature=1.0)).seed for _ in range(8)}
    assert len(seeds) == 8
    assert max(seeds) < 1 << 53
    zero = sampling_params(pb.SamplingParams(temperature=1.0, seed=0))
    assert zero.seed == 0


def test_a_model_without_chat_template_refuses_chat_only() -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="x")])
    with pytest.raises(ValueError, match="no chat template"):
        check_prompt(pb.GenerateRequest(chat=chat), has_chat_template=False)
    assert check_prompt(pb.GenerateRequest(text="abc"), has_chat_template=False) == 3
