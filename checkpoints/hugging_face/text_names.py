"""Names of the text model's tensors in a folder: what comes before them, and what is left out.

Models that see images have a text model within, under a prefix that changed with the versions of
transformers; so have those that were saved without their head.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from checkpoints.tensor_names import HUGGING_FACE_MODEL

# Before "embed_tokens.weight" and "layers.0.", and before "lm_head.weight".
_PREFIXES = (
    ("model.", ""),
    ("model.language_model.", ""),  # transformers from 4.52 on
    ("language_model.model.", "language_model."),
    ("model.text_model.", ""),  # SmolVLM
    ("language_model.", ""),
    ("", ""),
)
# Of a model that sees images, what no text goes through; "model." may come before it.
_IMAGE_PARTS = (
    *("vision_tower.", "vision_model.", "multi_modal_projector.", "connector."),
    "image_newline",
)
_BODY = "model."


@dataclass(frozen=True)
class TextNames:
    """``model``: names by canonical ones; ``layer_prefix`` has ``{layer}`` in it."""

    model: dict[str, str]
    layer_prefix: str


def find_text_names(found: Collection[str]) -> TextNames:
    """Returns the names by which ``found`` has a text model's tensors.

    Raises ``ValueError`` naming what was found instead.
    """
    embedding = HUGGING_FACE_MODEL["embed_tokens"].removeprefix(_BODY)
    for body, head in _PREFIXES:
        if body + embedding in found:
            names = {
                canonical: body + name.removeprefix(_BODY)
                if name.startswith(_BODY)
                else head + name
                for canonical, name in HUGGING_FACE_MODEL.items()
            }
            return TextNames(names, body + "layers.{layer}.")
    raise ValueError(_missing(embedding, found))


def image_tensors(found: Iterable[str]) -> list[str]:
    """Returns the names of tensors that only images go through."""
    return [name for name in found if name.removeprefix(_BODY).startswith(_IMAGE_PARTS)]


def _missing(embedding: str, found: Collection[str]) -> str:
    problem = f"tensor {_BODY + embedding!r} is missing"
    others = sorted(name for name in found if name.endswith(f".{embedding}"))
    if not others:
        return f"{problem}; {min(found)!r:.80} is there" if found else problem
    prefix = others[0].removesuffix(embedding)
    problem += f"; names begin with {prefix!r:.60}"
    if prefix.startswith("module."):
        problem += ", as DataParallel saves them: save the model that is its .module"
    elif prefix.startswith("base_model."):
        problem += ", as adapters are saved: merge them into the model and save that"
    elif prefix.startswith("_orig_mod."):
        problem += ", as a compiled module saves them: save the module that was compiled"
    return problem
