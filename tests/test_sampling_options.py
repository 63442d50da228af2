"""Sampling options: declared once, in jaxinfer/request.py, and found wherever options are listed.

Adding one also takes its field in the .proto, its column and its use in the sampler, and a keyword
of the client. These tests name what was forgotten.
"""

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor

from checkpoints.hugging_face.generation_config import read_generation
from jaxinfer.batch import BatchShape, Packer, packed_size
from jaxinfer.request import LIMITS, SAMPLING_OPTIONS, Request, SamplingOption, SamplingParams
from jaxinfer.sampling_columns import OptionColumns
from jaxinfer.schedule import Schedule, ScheduledSequence
from jaxinfer_entrypoints.command_line import chat as chat_options
from jaxinfer_entrypoints.command_line import sampling as sampling_options
from serving.client.options import GenerateOptions
from serving.client.requests import generate_request
from serving.proto.jaxinfer.v1 import inference_pb2 as pb
from serving.rpc.validate import SUPPORTED_FIELDS, sampling_params
from tests.jaxinfer.tiny import tiny_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("jaxinfer", "jaxinfer_entrypoints", "serving", "checkpoints", "pallas_kernels"),
    *("scripts", "tools"),
)
KINDS = {FieldDescriptor.CPPTYPE_DOUBLE: float, FieldDescriptor.CPPTYPE_INT32: int}

each_option = pytest.mark.parametrize("option", SAMPLING_OPTIONS, ids=lambda option: option.name)


def keyword(option: SamplingOption, value: float) -> dict[str, Any]:
    """The option's keyword, for calls whose types name every option."""
    return {option.name: value}


def with_example(option: SamplingOption) -> SamplingParams:
    """Sampling with the option's example, and nothing else."""
    return SamplingParams(**keyword(option, option.example))


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sampling_options.add_sampling_options(parser)
    return parser.parse_args(flags)


def flags_of(option: SamplingOption, value: float) -> tuple[str, str]:
    return f"--{option.name.replace('_', '-')}", str(value)


def test_every_number_of_sampling_params_is_declared() -> None:
    names = [field.name for field in fields(SamplingParams)]
    assert [option.name for option in SAMPLING_OPTIONS] == names[: len(SAMPLING_OPTIONS)]
    # One is pairs, the other is two words on the device and chosen where it is not given.
    assert names[len(SAMPLING_OPTIONS) :] == ["logit_bias", "seed"]


@each_option
def test_the_declaration_holds_together(option: SamplingOption) -> None:
    assert type(option.default) is type(option.example) is option.kind
    assert option.example != option.default
    assert option.neutral.startswith(f"{option.default:g} is ")
    assert LIMITS[option.name] is option.limit
    option.limit.check(option.name, option.default)
    assert getattr(SamplingParams(), option.name) == option.default
    assert getattr(with_example(option), option.name) == option.example


@each_option
def test_values_outside_the_limits_are_refused_by_name(option: SamplingOption) -> None:
    low, high = option.kind(option.limit.low), option.kind(option.limit.high)
    for outside in (low - 1, high + 1, *((low,) if option.limit.above else ())):
        refusal = re.escape(f"{option.name} must be in ") + r"[(\[].*\], got " + str(outside)
        with pytest.raises(ValueError, match=f"^{refusal}$"):
            SamplingParams(**keyword(option, outside))
        with pytest.raises(ValueError, match=f"^{refusal}$"):
            sampling_params(pb.SamplingParams(**keyword(option, outside)))
        with pytest.raises(ValueError, match=f"^{refusal}$"):
            sampling_options.sampling_params(parse(*flags_of(option, outside)))
    if option.kind is int:
        with pytest.raises(ValueError, match=f"^{option.name} must be a whole number"):
            SamplingParams(**keyword(option, option.example + 0.5))


@each_option
def test_it_has_a_field_of_the_message(option: SamplingOption) -> None:
    field = pb.SamplingParams.DESCRIPTOR.fields_by_name[option.name]
    assert KINDS[field.cpp_type] is option.kind
    assert field.has_presence
    assert option.name in SUPPORTED_FIELDS["SamplingParams"]
    message = pb.SamplingParams(**keyword(option, option.example), seed=0)
    assert sampling_params(message) == with_example(option)
    # What the message leaves out is as the model says.
    assert sampling_params(pb.SamplingParams(seed=0), with_example(option)) == with_example(option)


def test_every_field_of_the_message_is_an_option_or_something_else() -> None:
    numbers = {
        field.name
        for field in pb.SamplingParams.DESCRIPTOR.fields
        if field.cpp_type in KINDS and not field.is_repeated
    }
    others = {"max_tokens", "min_tokens", "n", "logprobs", "prompt_logprobs"}
    assert numbers == others | {option.name for option in SAMPLING_OPTIONS}


@each_option
def test_it_has_a_keyword_of_the_client(option: SamplingOption) -> None:
    assert GenerateOptions.__annotations__[option.name] is option.kind
    options = cast(GenerateOptions, keyword(option, option.example))
    assert getattr(generate_request("x", options).sampling, option.name) == option.example


def test_the_columns_are_the_options() -> None:
    names = [field.name for field in fields(OptionColumns)]
    assert sorted(names) == sorted(option.name for option in SAMPLING_OPTIONS)


@each_option
def test_it_reaches_the_packed_buffer(option: SamplingOption) -> None:
    config, shape = tiny_config(), BatchShape(8, 0)

    def packed(sampling: SamplingParams) -> np.ndarray:
        request = Request("a", (1, 2), 4, sampling)
        decode = ScheduledSequence(request, 0, 3, 0, 1, 1, (0,), True)
        buffer, _ = Packer(config).pack(Schedule((decode,)), shape)
        assert buffer.shape == (packed_size(shape, config),)
        return buffer

    plain, asked = packed(SamplingParams()), packed(with_example(option))
    (changed,) = np.flatnonzero(plain != asked)
    dtype = np.float32 if option.kind is float else np.int32
    word = asked[changed : changed + 1].view(dtype)[0]
    assert word == dtype(option.example)


@each_option
def test_it_has_a_flag(option: SamplingOption) -> None:
    given = parse(*flags_of(option, option.example))
    assert sampling_options.sampling_params(given) == with_example(option)
    # A flag that is not given leaves the model's default, one that is replaces it.
    assert sampling_options.sampling_params(parse(), with_example(option)) == with_example(option)
    neutral = parse(*flags_of(option, option.default))
    assert sampling_options.sampling_params(neutral, with_example(option)) == SamplingParams()


@each_option
def test_chats_send_it(option: SamplingOption, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["chat", *flags_of(option, option.example)])
    wanted = chat_options.generate_options(chat_options.parse_arguments())
    assert wanted == {option.name: option.example}


@each_option
def test_generation_config_may_say_it(option: SamplingOption, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    for is_sampled, read_when in ((False, ("always",)), (True, ("always", "sampled"))):
        path.write_text(json.dumps({option.name: option.example, "do_sample": is_sampled}))
        sampling = read_generation(tmp_path, 100).sampling
        is_read = option.model_default in read_when
        usual = 1.0 if is_sampled and option.name == "temperature" else option.default
        assert getattr(sampling, option.name) == (option.example if is_read else usual)


@each_option
def test_models_defaults_are_told(option: SamplingOption) -> None:
    told = sampling_options.describe_sampling(with_example(option))
    expected = f"{option.name} {option.example:g}" if option.has_model_default else ""
    assert told == expected


# Greedy is a temperature wherever it matters, and top_k a function of JAX.
NAMES = [option.name for option in SAMPLING_OPTIONS if option.name not in ("temperature", "top_k")]


@pytest.mark.parametrize("name", NAMES)
def test_at_most_five_files_name_an_option(name: str) -> None:
    """Those of the declaration, the message, the columns, the sampler and the client's keywords."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*"))]
    naming = [
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.suffix in (".py", ".proto")
        and "_pb2" not in path.name
        and re.search(rf"\b{name}\b", path.read_text())
    ]
    assert "jaxinfer/request.py" in naming
    assert len(naming) <= 5, naming
