"""The value that an engine, its state and its memory plan follow from."""

from dataclasses import dataclass

from jax.sharding import Mesh

from jaxinfer.config import DraftModel, DtypePolicy, EngineConfig, ModelConfig


@dataclass(frozen=True)
class EngineSpec:
    """A model, the sizes it is served in, its dtypes, its devices, and who drafts for it.

    ``draft`` is the draft model that ``config.draft`` asks for, None where it asks for none.
    ``mesh``: the devices of one engine. Raises ``ValueError`` for parts that do not fit together.
    """

    model: ModelConfig
    config: EngineConfig
    dtypes: DtypePolicy
    mesh: Mesh
    draft: DraftModel | None = None

    def __post_init__(self) -> None:
        if self.config.drafter.needs_model != (self.draft is not None):
            raise ValueError(
                f"config.draft is {self.config.draft} and draft is {self.draft}: one is missing"
            )
        if self.config.num_draft_layers >= self.model.num_hidden_layers:
            raise ValueError(
                f"a model of {self.model.num_hidden_layers} layers can draft with its first "
                f"{self.model.num_hidden_layers - 1} at most, got {self.config.num_draft_layers}"
            )
