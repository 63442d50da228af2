"""Options of a model that is to be loaded, as one value; their defaults live here."""

import dataclasses
import re
import typing
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypedDict

from checkpoints.stored import QUANTIZATIONS
from jaxinfer.config import (
    DTYPES,
    KV_DTYPES,
    SIZE_LIMITS,
    VERIFICATIONS,
    EngineConfig,
    Verification,
    check_size,
)
from jaxinfer.drafters import DRAFTERS, drafter_traits
from jaxinfer_entrypoints.machine.tpu_targets import parse_target
from pallas_kernels.ragged_paged_attention import IMPLEMENTATIONS

DEFAULT_MODEL = "smollm2-135m-instruct"
# The drafter of every ``draft`` that is no drafter's own name: such a name is a model's.
DRAFTER_OF_MODELS = "model"
# Far above what there is: larger numbers are slips.
MAX_DEVICES = 1 << 20
MAX_KV_MEMORY = 1 << 50

_SIZES = EngineConfig()


@dataclass(frozen=True)
class LoadOptions:
    """The model, where it runs, in which formats and with which sizes.

    ``model``: a file, a folder, a model of the hub or of the catalog. ``device``: "cpu", "gpu", the
    name of a TPU such as "v5e-8", or None for the best platform that JAX finds. ``dtype``: of
    weights, activations and KV cache, None for the platform's own. ``kv_dtype``: "auto" is as
    ``dtype``. ``quantize``: a format of matrices, None for what a converted folder was made in.
    ``generation_config``: sample as the model's own file says where a request says nothing.

    ``tensor_parallel`` devices share each layer (None: 1, and on TPU as many as the heads can be
    divided over), ``data_parallel`` replicas have devices of their own. ``kv_memory``: bytes of the
    KV cache on all devices of a replica, None for what is free. ``draft``: who drafts tokens:
    "ngram", "layers:N" or a model; ``draft_quantize``: its matrices, None for ``quantize``.
    ``compile_only``: devices are only described, and nothing is loaded.
    The others are those of ``EngineConfig``; None follows from the model and the platform.

    Raises ``ValueError`` naming the option, the value and the limit.
    """

    model: str = DEFAULT_MODEL
    device: str | None = None
    dtype: str | None = None
    kv_dtype: str = "auto"
    quantize: str | None = None
    generation_config: bool = True
    tensor_parallel: int | None = None
    data_parallel: int = 1
    max_num_seqs: int = _SIZES.max_num_seqs
    max_num_batched_tokens: int = _SIZES.max_num_batched_tokens
    max_model_len: int | None = None
    page_size: int | None = None
    max_steps_per_call: int | None = None
    kv_memory: int | None = None
    prefix_cache: bool = _SIZES.prefix_cache
    priority_seconds: float = _SIZES.priority_seconds
    batch_invariant: bool = _SIZES.batch_invariant
    attention: str | None = None
    draft: str | None = None
    num_drafts: int = _SIZES.num_drafts
    verify: Verification = _SIZES.verify
    draft_quantize: str | None = None
    compile_only: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        if self.device not in (None, "cpu", "gpu"):
            parse_target(self.device)
        choices = {
            "dtype": (None, *DTYPES),
            "kv_dtype": ("auto", *KV_DTYPES),
            "quantize": (None, *QUANTIZATIONS),
            "draft_quantize": (None, *QUANTIZATIONS),
            "verify": VERIFICATIONS,
            "attention": (None, *IMPLEMENTATIONS),
        }
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {_listed(known)}, got {value!r:.80}")
        limits = {
            "tensor_parallel": MAX_DEVICES,
            "data_parallel": MAX_DEVICES,
            "kv_memory": MAX_KV_MEMORY,
        }
        for name, most in limits.items():
            if (value := getattr(self, name)) is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be between 1 and {most}, got {value}")
        for field in dataclasses.fields(self):
            if field.name in SIZE_LIMITS and (value := getattr(self, field.name)) is not None:
                check_size(field.name, value)
        _ = self.drafter  # which refuses one that cannot be

    @property
    def tpu(self) -> str | None:
        """The name of the TPU that is asked for, None for another device."""
        return None if self.device in (None, "cpu", "gpu") else self.device

    @property
    def drafter(self) -> tuple[str | None, int]:
        """Returns who drafts, and with how many of the model's layers where it is those.

        Raises ``ValueError`` for what cannot be.
        """
        kind, num_layers = _drafter(self.draft)
        if self.draft_quantize is not None and not drafter_traits(kind).needs_model:
            raise ValueError("--draft-quantize needs a draft model: --draft MODEL")
        return kind, num_layers

    @property
    def of_draft_model(self) -> "LoadOptions":
        """These options as they would be if the draft model were the model."""
        assert self.draft is not None
        quantize = self.quantize if self.draft_quantize is None else self.draft_quantize
        return dataclasses.replace(
            self, model=self.draft, quantize=quantize, draft=None, draft_quantize=None
        )


class LoadKeywords(TypedDict, total=False):
    """The fields of ``LoadOptions`` as keywords, all but ``model``."""

    device: str | None
    dtype: str | None
    kv_dtype: str
    quantize: str | None
    generation_config: bool
    tensor_parallel: int | None
    data_parallel: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    page_size: int | None
    max_steps_per_call: int | None
    kv_memory: int | None
    prefix_cache: bool
    priority_seconds: float
    batch_invariant: bool
    attention: str | None
    draft: str | None
    num_drafts: int
    verify: Verification
    draft_quantize: str | None
    compile_only: bool


def _drafter(draft: str | None) -> tuple[str | None, int]:
    """Reads "ngram", "layers:3" or the name of a model, whatever the table of drafters has."""
    if draft is None:
        return None, 0
    if not draft.strip():
        raise ValueError("--draft names nobody: ngram, layers:N or a model")
    name, colon, number = draft.partition(":")
    takes_layers = name in DRAFTERS and DRAFTERS[name].takes_layers
    if bool(colon) != takes_layers or name not in DRAFTERS or DRAFTERS[name].needs_model:
        return DRAFTER_OF_MODELS, 0
    if not takes_layers:
        return name, 0
    if not re.fullmatch(r"[1-9]\d{0,3}", number):
        raise ValueError(f"--draft {name}:N needs a number of layers from 1 on, got {draft!r}")
    return name, int(number)


def _check_type(field: dataclasses.Field[Any], value: object) -> None:
    kinds = typing.get_args(field.type) or (field.type,)
    if value is None and NoneType in kinds:
        return
    is_bool = isinstance(value, bool)  # which is an int to Python
    if bool in kinds:
        fits, wanted = is_bool, "True or False"
    elif float in kinds:
        fits, wanted = isinstance(value, int | float) and not is_bool, "a number"
    elif int in kinds:
        fits, wanted = isinstance(value, int) and not is_bool, "an integer"
    else:
        fits, wanted = isinstance(value, str), "a str"
    if not fits:
        raise ValueError(f"{field.name} must be {wanted}, got {value!r:.80}")


def _listed(choices: tuple[str | None, ...]) -> str:
    return ", ".join(str(choice) for choice in choices)
