"""Every field of the schema is either served or refused by name; generated from the descriptor."""

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.validate import (
    NEUTRAL_VALUES,
    SUPPORTED_FIELDS,
    check_prompt,
    refuse_unsupported,
    sampling_params,
)

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
    """Sets a field to ``value``, or to an example that is no neutral value."""
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
        if value == NEUTRAL_VALUES.get(f"{message.DESCRIPTOR.name}.{field.name}"):
            value = not value
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def test_the_tables_name_existing_fields() -> None:
    supported = {f"{m}.{f}" for m, fields in SUPPORTED_FIELDS.items() for f in fields}
    assert supported <= FIELDS.keys()
    assert NEUTRAL_VALUES.keys() <= FIELDS.keys() - supported
    assert {"SamplingParams.min_p", "StructuredOutput.regex"} <= FIELDS.keys() - supported


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


@pytest.mark.parametrize(("name", "value"), NEUTRAL_VALUES.items())
def test_neutral_values_say_nothing(name: str, value: object) -> None:
    owner, field = FIELDS[name]
    message = new_message(owner)
    set_field(message, field, value)
    refuse_unsupported(message)


def test_refusals_name_the_path() -> None:
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="a"), pb.ChatMessage(role="b", name="c")])
    )
    with pytest.raises(ValueError, match=r"^chat\.messages\[1\]\.name is not supported yet"):
        refuse_unsupported(request)
    request = pb.GenerateRequest(sampling=pb.SamplingParams(min_p=float("nan")))
    with pytest.raises(ValueError, match=r"^sampling\.min_p is not supported yet"):
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
