"""Flax model definitions, one file a family, found by the checkpoint's architecture name."""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxinfer import weights
from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.declaration import Declaration, declaration_of
from jaxinfer.models.family import Family
from jaxinfer.models.fields import Fields
from jaxinfer.models.unread import refuse_unread
from jaxinfer.sharding import num_tensor_devices
from jaxinfer.weights import MatrixPath, QuantizedWeight

# ``model_type`` of a config.json -> its file here; imported when asked for.
ARCHITECTURES: Mapping[str, str] = {
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
}

# ``model_type`` of models that see images too -> that of the text part, whose fields are in
# ``text_config``, where these leave it out.
IMAGE_TEXT: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "smolvlm": "llama",
}

# ``general.architecture`` of a GGUF file -> ``model_type``. Mistral's are "llama" there; Mixtral's
# too, and have experts.
GGUF_ARCHITECTURES: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "llama": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}


def family(architecture: str) -> Family:
    """The family of a ``model_type``. Raises ``ValueError`` listing what is supported."""
    if architecture not in ARCHITECTURES:
        supported = ", ".join(sorted({*ARCHITECTURES, *IMAGE_TEXT}))
        raise ValueError(
            f"architecture {architecture!r:.80} is not supported; supported: {supported}"
        )
    return importlib.import_module(f"{__name__}.{ARCHITECTURES[architecture]}").FAMILY


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The model that the fields of a ``config.json`` describe; of one with images the text part.

    Raises ``ValueError`` for an unknown ``model_type``, for fields that are missing or cannot be,
    and for those that ask for what the family's module does not compute or does not look at.
    """
    checked = _text_fields(Fields(fields))
    model = family(checked.text("model_type")).read_config(checked)
    refuse_unread(checked)
    return model


def _text_fields(fields: Fields) -> Fields:
    """``fields``, or of a model that sees images those of its text part."""
    model_type = fields.text("model_type")
    if model_type not in IMAGE_TEXT or not fields.has("text_config"):
        return fields
    defaults: dict[str, Any] = {"model_type": IMAGE_TEXT[model_type]}
    if fields.has("tie_word_embeddings"):
        defaults["tie_word_embeddings"] = fields.boolean("tie_word_embeddings", False)
    return fields.fields("text_config").with_defaults(defaults)


def build(
    model: ModelConfig,
    dtypes: DtypePolicy,
    rngs: nnx.Rngs | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """The Flax module of ``model``, with random weights; under ``nnx.eval_shape`` it costs nothing.

    Its parameters have the physical shapes that ``mesh`` asks for, by default one device's.
    Raises ``ValueError`` listing what is supported for an unknown architecture, and for heads that
    cannot be divided over the mesh.
    """
    module = family(model.architecture).module
    # Parameters carry logical axis names and no mesh: they are placed by jaxinfer.sharding.
    with nnx.use_eager_sharding(False):
        built = module(model, dtypes, rngs or nnx.Rngs(0), mesh)
        weights.quantize_module(built, dtypes, num_tensor_devices(mesh))
        return built


def abstract(
    model: ModelConfig, dtypes: DtypePolicy, mesh: Mesh | None = None
) -> tuple[Any, nnx.State]:
    """The graph definition and the abstract parameters, nothing allocated."""
    return nnx.split(nnx.eval_shape(lambda: build(model, dtypes, mesh=mesh)))


def quantized_weights(
    model: ModelConfig, dtypes: DtypePolicy, mesh: Mesh | None = None
) -> Mapping[MatrixPath, QuantizedWeight]:
    """The declarations of quantized matrices, by path; {} where none is. They hold no numbers."""
    found: dict[MatrixPath, QuantizedWeight] = {}

    def look() -> Any:
        module = build(model, dtypes, mesh=mesh)
        found.update(weights.quantized_weights(module))
        return module

    if dtypes.quantization is not None:
        nnx.eval_shape(look)
    return found


@functools.lru_cache(maxsize=8)
def declared_parameters(model: ModelConfig) -> Mapping[MatrixPath, Declaration]:
    """Returns how every parameter of ``model`` is declared, by its path, in logical shapes.

    All layers have the same: one is looked at, since a file may claim thousands.
    """
    one = dataclasses.replace(model, num_hidden_layers=1, layer_types=model.layer_types[:1])
    _, state = abstract(one, DtypePolicy("float32", "float32", "float32"))
    declared = {}
    for path, variable in nnx.to_flat_state(state):
        one = declaration_of(variable)
        if path[0] == "layers":
            declared |= {("layers", i, *path[2:]): one for i in range(model.num_hidden_layers)}
        else:
            declared[path] = one
    return declared


def parameter_shapes(model: ModelConfig) -> Mapping[MatrixPath, tuple[int, ...]]:
    """Returns the logical shape of every parameter of ``model``, by its path."""
    return {path: declared.shape for path, declared in declared_parameters(model).items()}
