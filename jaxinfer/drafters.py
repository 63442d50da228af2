"""The table of drafters: the name, the needs and the file of each. Never imports JAX.

The host plans by a drafter's traits; its file, which has the part in the program of a step, is
imported when a program is made (``jaxinfer.speculation.drafter``).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DrafterTraits:
    """The needs of a drafter, and ``module``, where its class ``Drafter`` is.

    ``reads_text``: it reads the slot's table of tokens, which then has all of them, also those that
    were found in the prefix cache. ``takes_layers``: it is the model's own first
    ``EngineConfig.num_draft_layers``. ``needs_model``: it is ``EngineSpec.draft``, another model.
    ``has_pages``: that model's keys and values are kept, under the page ids of the target's. They
    may lag behind the text; the drafter catches up with it when drafts are wanted again.
    ``costs_each``: every draft takes another run of it, so that a sequence is asked for as many as
    were right; else as many as there is room for cost the same as one.
    """

    module: str
    reads_text: bool = False
    takes_layers: bool = False
    needs_model: bool = False
    has_pages: bool = False
    costs_each: bool = False


# ``EngineConfig.draft`` -> who that is.
DRAFTERS: Mapping[str, DrafterTraits] = {
    "ngram": DrafterTraits("jaxinfer.speculation.ngram", reads_text=True),
    "layers": DrafterTraits("jaxinfer.speculation.layers", takes_layers=True, costs_each=True),
    "model": DrafterTraits(
        "jaxinfer.speculation.model", needs_model=True, has_pages=True, costs_each=True
    ),
}

# Plain decoding has no drafter, and needs nothing.
NOBODY = DrafterTraits("")


def drafter_traits(name: str | None) -> DrafterTraits:
    """Returns the traits of a drafter, those of nobody for None.

    Raises ``ValueError`` for a name that is not in the table.
    """
    if name is None:
        return NOBODY
    if name not in DRAFTERS:
        raise ValueError(f"draft must be one of {', '.join(DRAFTERS)}, got {name!r:.80}")
    return DRAFTERS[name]
