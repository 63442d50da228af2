"""Converted folders: every family, any mesh, damage."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from checkpoints.checkpoint import Quantization
from checkpoints.converted import checkpoint as orbax
from checkpoints.converted.checkpoint import OrbaxCheckpoint
from checkpoints.converted.convert import Rounding, convert, provenance
from checkpoints.gguf.checkpoint import GGUFCheckpoint
from checkpoints.load import load_parameters, open_checkpoint
from checkpoints.stored import require_stored_formats
from jaxinfer import models, sharding
from jaxinfer.config import STORED, AnyTokenizer, DtypePolicy, TokenizerSpec
from jaxinfer.models import quantized_weights
from jaxinfer.request import Ending, SamplingParams
from jaxinfer.sharding import make_mesh
from tests.checkpoints.gguf.tiny_gguf import Q4_1, llama_bytes
from tests.conftest import ManyDevices
from tests.jaxinfer.models.random_checkpoint import CASES, RandomCheckpoint
from tests.jaxinfer.models.test_families import ONE_OF_EACH, SUBJECT
from tests.serving.text.test_tokenizer_reference import KINDS, spec_of
from tests.thorough import thorough_beyond

TOKENIZER = TokenizerSpec(tokens=("a", "b"), merges=(), pre_tokenizer="gpt-2", eos_token_ids=(1,))
ENDING = Ending(stop=("\n\n",), min_tokens=2)
SAMPLING = SamplingParams(temperature=0.5, top_k=3)


class Source(RandomCheckpoint):
    """A random model with a tokenizer and sampling of its own."""

    tokenizer: AnyTokenizer = TOKENIZER
    default_sampling = SAMPLING
    default_ending = ENDING


def write(folder: Path, case: str = "qwen3", dtype: Any = np.float32) -> None:
    convert(Source(case), folder, np.dtype(dtype), {"source": case})


def loaded_over(num_devices: int, case: str, folder: Path | None) -> dict[Any, np.ndarray]:
    """Parameters by path, over so many devices and read back; from ``folder`` or as drawn."""
    source = open_checkpoint(folder) if folder else Source(case)
    mesh = make_mesh(jax.devices()[:num_devices])
    _, state = models.abstract(source.model, DtypePolicy.for_platform("cpu"), mesh)
    abstract = sharding.abstract_parameters(state, mesh)
    loaded = load_parameters(source, abstract, num_devices=num_devices)
    for array, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.sharding) == (wanted.shape, wanted.sharding)
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(loaded)}


@pytest.mark.parametrize("case", thorough_beyond(["gemma3"], ONE_OF_EACH, SUBJECT))
def test_every_family_on_one_device_and_on_eight(
    tmp_path: Path, many_devices: ManyDevices, case: str
) -> None:
    folder = tmp_path / "converted"
    write(folder, case)
    assert open_checkpoint(folder).model == RandomCheckpoint(case).model
    for num_devices in (1, 2, 8):
        expected = many_devices(loaded_over, num_devices, case, None)
        found = many_devices(loaded_over, num_devices, case, folder)
        assert expected.keys() == found.keys()
        for path in expected:
            np.testing.assert_array_equal(found[path], expected[path], err_msg=path, strict=True)


def quantized_over(
    num_devices: int, case: str, folder: Path | None, name: str
) -> dict[str, np.ndarray]:
    """Parameters in a format, from what was drawn or from ``folder``, over so many devices."""
    source = open_checkpoint(folder) if folder else Source(case)
    mesh = make_mesh(jax.devices()[:num_devices])
    dtypes = DtypePolicy("float32", "float32", "float32", quantization=name)
    _, state = models.abstract(source.model, dtypes, mesh)
    abstract = sharding.abstract_parameters(state, mesh)
    made = quantized_weights(source.model, dtypes, mesh)
    loaded = load_parameters(source, abstract, num_devices=num_devices, quantized=made)
    for array, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(loaded)}


@pytest.mark.parametrize(("case", "name"), [("qwen3_moe", "int4"), ("mixtral", "int8")])
def test_quantized_matrices_come_back_bit_by_bit(
    tmp_path: Path, many_devices: ManyDevices, case: str, name: str
) -> None:
    """And are the same if they are quantized after, from a folder of floats."""
    folder, floats = tmp_path / "converted", tmp_path / "floats"
    convert(Source(case), folder, np.dtype(np.float32), {}, None, Rounding(Quantization(name)))
    convert(Source(case), floats, np.dtype(np.float32), {})
    wanted = quantized_over(1, case, None, name)
    assert any(array.dtype in (np.int8, np.uint8) for array in wanted.values())
    for found in (quantized_over(1, case, folder, name), quantized_over(1, case, floats, name)):
        assert found.keys() == wanted.keys()
        for path, array in wanted.items():
            assert found[path].dtype == array.dtype
            np.testing.assert_array_equal(found[path], array, err_msg=path)
    on_eight = many_devices(quantized_over, 8, case, None, name)
    for source in (folder, floats):
        for path, array in many_devices(quantized_over, 8, case, source, name).items():
            np.testing.assert_array_equal(array, on_eight[path], err_msg=path)
    size, plain = (sum(f.stat().st_size for f in x.rglob("*")) for x in (folder, floats))
    assert size < plain / 2


def test_the_integers_of_a_file_are_converted(tmp_path: Path) -> None:
    path, folder = tmp_path / "model.gguf", tmp_path / "converted"
    path.write_bytes(llama_bytes(Q4_1))
    source = GGUFCheckpoint(path)
    quantization = Quantization(STORED, require_stored_formats("it", source))
    convert(source, folder, np.dtype(np.float32), {}, None, Rounding(quantization))
    checkpoint = OrbaxCheckpoint(folder)
    assert checkpoint.quantization == quantization
    dtypes = quantization.policy
    _, state = models.abstract(source.model, dtypes)
    abstract = sharding.abstract_parameters(state, make_mesh(jax.devices()[:1]))
    made = quantized_weights(source.model, dtypes)
    wanted = load_parameters(source, abstract, quantized=made, stored=True)
    found = load_parameters(checkpoint, abstract, quantized=made)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (3, "quantization must be an object, got 3"),
        ({"name": "int3", "formats": []}, "no format 'int3' of matrices"),
        ({"name": "int4", "formats": [1]}, "formats must be a list, of one or more"),
        ({"name": "checkpoint", "formats": [{"path": 1}]}, "an entry needs a path"),
        (
            {"name": "checkpoint", "formats": [{"path": ["lm_head"], "format": {"kind": "Int9"}}]},
            "kind must be one of Int8Format, Float8Format, GroupedFormat",
        ),
        (
            {
                "name": "checkpoint",
                "formats": [
                    {
                        "path": ["lm_head"],
                        "format": {"kind": "GroupedFormat", "bits": 3, "group": 32},
                    }
                ],
            },
            "bits must be one of 4, 8, got 3",
        ),
        ({"name": "int8", "formats": []}, r"parameter .* (is missing|is not of this model)"),
    ],
)
def test_a_description_of_other_formats_is_refused(
    tmp_path: Path, value: object, match: str
) -> None:
    folder = tmp_path / "converted"
    write(folder)
    path = folder / orbax.DESCRIPTION
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"quantization": value}))
    with pytest.raises(ValueError, match=match):
        OrbaxCheckpoint(folder)


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("converted"))
    assert loaded_over(1, "qwen3", Path("converted"))


def test_parameters_in_another_dtype(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    write(folder, dtype=ml_dtypes.bfloat16)
    found, expected = loaded_over(1, "qwen3", folder), loaded_over(1, "qwen3", None)
    for path, array in expected.items():
        rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[path], rounded, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_come_back(tmp_path: Path, kind: str) -> None:
    source = Source("qwen3")
    source.model = replace(source.model, vocab_size=600)
    spec = replace(spec_of(kind), chat_template="{{ messages }}", eos_token_ids=(3, 1))
    named = (("pad_token", "<pad>"), ("image_token", "<i>"))
    spec = replace(spec, tool_template="{{ tools }}", template_tokens=named)
    parameters = {
        path: np.zeros(shape, np.float32)
        for path, shape in models.parameter_shapes(source.model).items()
    }
    folder = tmp_path / "converted"
    described = orbax.Described(source.model, spec, SAMPLING, {}, default_ending=ENDING)
    orbax.write_checkpoint(folder, described, parameters)
    checkpoint = OrbaxCheckpoint(folder)
    assert checkpoint.tokenizer == spec
    assert checkpoint.default_sampling == SAMPLING
    assert checkpoint.default_ending == ENDING


def test_provenance(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"abc")
    counted: list[tuple[int, int]] = []
    told = provenance("a", file, np.dtype("float32"), lambda *count: counted.append(count))
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert told["files"] == {"a.gguf": {"sha256": abc, "bytes": 3}}
    assert (told["source"], told["dtype"], counted) == ("a", "float32", [(3, 3)])
    assert told["versions"]["jax"] == jax.__version__
    assert json.loads(json.dumps(told)) == told


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/x/y cannot be made: Not a directory"):
        write(tmp_path / "file" / "x" / "y")


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "converted"

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(orbax, "_write_json", fail)
    with pytest.raises(OSError, match="No space left"):
        write(folder)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    write(folder)
    with pytest.raises(ValueError, match="converted exists"):
        write(folder)
    source = Source("qwen3")
    source.tensor = lambda name: np.full_like(Source("qwen3").tensor(name), np.nan)
    with pytest.raises(ValueError, match="not finite"):
        convert(source, tmp_path / "b", np.dtype("float32"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


def edit(change: Callable[[dict[str, Any]], object], name: str = "jaxinfer.json"):
    def apply(folder: Path) -> None:
        path = folder / name
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    return apply


def model_with(**values: Any):
    return edit(lambda fields: fields["model"].update(values))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: shutil.rmtree(f / "parameters"), "parameters: no such folder"),
        (lambda f: (f / "parameters" / "manifest.ocdbt").unlink(), "manifest.ocdbt: no such file"),
        (lambda f: shutil.rmtree(f / "parameters" / "d"), "d: no such file"),
        (lambda f: (f / "parameters" / "_METADATA").write_text("{"), "no Orbax checkpoint"),
        (lambda f: (f / "jaxinfer.json").write_text("{"), "jaxinfer.json: not valid"),
        (edit(lambda fields: fields.update(format=2)), "format must be 1, got 2"),
        (edit(lambda fields: fields.pop("model")), "model must be an object, got None"),
        (edit(lambda fields: fields["model"].pop("head_dim")), "model.head_dim is missing"),
        (model_with(colour=1), "model has no field 'colour'"),
        (model_with(vocab_size="97"), "model.vocab_size must be of type int, got '97'"),
        (model_with(vocab_size=True), "model.vocab_size must be of type int, got True"),
        (model_with(vocab_size=1 << 60), "model.vocab_size must be at most 2147483648"),
        (model_with(vocab_size=98), r"has shape \(97, 96\), the model needs \(98, 96\)"),
        (model_with(num_hidden_layers=3), r"parameter layers.2.* is missing"),
        (model_with(num_hidden_layers=1), r"parameter layers.1.* is not of this model"),
        (model_with(num_hidden_layers=1 << 20), "must be at most 4096, got 1048576"),
        (model_with(rope_theta="1"), "model.rope_theta must be of type float"),
        (model_with(layer_types=["x", "x"]), "model.layer_types must be one of full_attention"),
        (model_with(rope_scaling={"kind": "odd"}), "model.rope_scaling.kind must be one of"),
        (model_with(rope_scaling=3), "model.rope_scaling must be an object, got 3"),
        (model_with(architecture="mamba"), "'mamba' is not supported"),
        (edit(lambda f: f["default_sampling"].update(top_p=7)), "top_p must be in"),
        (edit(lambda f: f["default_sampling"].update(logit_bias=[[1]])), "must be 2 values, got 1"),
        (edit(lambda f: f["default_ending"].update(min_tokens="1")), "min_tokens must be of type"),
        (edit(lambda f: f["default_ending"].update(stop=[""])), r"stop\[0\] must be in \[1, 256"),
    ],
)
def test_damaged_folders_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], match: str
) -> None:
    folder = tmp_path / "converted"
    write(folder)
    damage(folder)

    def load() -> None:
        checkpoint = open_checkpoint(folder)
        _, state = models.abstract(checkpoint.model, DtypePolicy.for_platform("cpu"))
        load_parameters(
            checkpoint, sharding.abstract_parameters(state, make_mesh(jax.devices()[:1]))
        )

    with pytest.raises(ValueError, match=match) as error:
        load()
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "vocabulary.json").unlink(), "vocabulary.json: no such file"),
        (edit(lambda v: v.pop("kind"), "vocabulary.json"), "kind must be one of byte_level"),
        (edit(lambda v: v.update(kind=[]), "vocabulary.json"), "kind must be one of byte_level"),
        (edit(lambda v: v.update(tokens="ab"), "vocabulary.json"), "tokens must be a list"),
        (edit(lambda v: v.update(tokens=["a"] * 98), "vocabulary.json"), "the embedding has 97"),
        (edit(lambda v: v.update(eos_token_ids=[2]), "vocabulary.json"), r"in \[0, 1\], got 2"),
        (edit(lambda v: v.update(bos_token_id=-1), "vocabulary.json"), r"in \[0, 1\], got -1"),
    ],
)
def test_damaged_vocabularies_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], match: str
) -> None:
    folder = tmp_path / "converted"
    write(folder)
    damage(folder)
    checkpoint = OrbaxCheckpoint(folder)
    with pytest.raises(ValueError, match=match):
        assert checkpoint.tokenizer


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    source = Source("qwen3")
    parameters = {
        path: np.full(shape, np.inf if path[-1] == "router" or "norm" in path else 0, np.float32)
        for path, shape in models.parameter_shapes(source.model).items()
    }
    folder = tmp_path / "converted"
    described = orbax.Described(source.model, TOKENIZER, SAMPLING, {})
    orbax.write_checkpoint(folder, described, parameters)
    with pytest.raises(ValueError, match="values that are not finite: a damaged checkpoint"):
        loaded_over(1, "qwen3", folder)


def test_every_case_can_be_described() -> None:
    """The configuration of every family comes back from its JSON."""
    for case in CASES:
        model = RandomCheckpoint(case).model
        fields = json.loads(json.dumps(orbax.to_json(model)))
        assert orbax.from_json(type(model), fields, "model") == model
