"""Descriptions of a model, its tokenizer and an engine, as frozen values. Never imports JAX.

Field names are those of a Hugging Face ``config.json`` where one exists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from jaxinfer.drafters import NOBODY, DrafterTraits, drafter_traits


@dataclass(frozen=True)
class RopeScaling:
    """A rule by which rotary frequencies are stretched beyond the trained context.

    ``linear`` divides every frequency by ``factor``. ``llama3`` is the smooth rule of Llama 3.1
    (Grattafiori et al. 2024), ``yarn`` that of Peng et al. 2023. ``factors`` divides frequency i by
    ``factors[i]``, which is how GGUF stores an already evaluated rule. ``longrope`` (Ding et al.
    2024) does so too, with ``short_factors`` where the context served is not longer than
    ``original_max_position_embeddings``. ``attention_factor`` multiplies cosines and sines.
    """

    kind: Literal["linear", "llama3", "factors", "yarn", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer. ``architecture`` picks its module in models/.

    ``layer_types``: which layers see only the last ``sliding_window`` tokens; () for all of them
    where there is a window. They rotate by ``local_rope_theta`` where that is given, unscaled.
    ``rotary_dim``: how many of a head's dimensions are rotated, the first ones; None for all.
    ``query_pre_attn_scalar``: scores are divided by its root instead of ``head_dim``'s.
    With ``num_experts`` the MLP of a layer is that many of ``intermediate_size``, of which a token
    takes ``num_experts_per_tok``; ``norm_topk_prob``: their weights are made to add up to 1.
    ``unused_tokens``: ranges [first, end) of ids that no token has, in order: rows that fill the
    embedding up to a round number. They are never chosen, and asked for neither.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] = ()
    local_rope_theta: float | None = None
    rotary_dim: int | None = None
    query_pre_attn_scalar: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True
    unused_tokens: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta", "local_rope_theta", "query_pre_attn_scalar"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self._check_rotation()
        self._check_layers()
        self._check_experts()
        self._check_unused_tokens()

    @property
    def num_tokens(self) -> int:
        """Returns the end of the ids that may be asked for: those behind it only fill up."""
        unused = self.unused_tokens
        return unused[-1][0] if unused and unused[-1][1] == self.vocab_size else self.vocab_size

    def _check_unused_tokens(self) -> None:
        last = 0
        for first, end in self.unused_tokens:
            if not last <= first < end <= self.vocab_size:
                raise ValueError(
                    f"unused_tokens must be ranges in order and in [0, {self.vocab_size}], got "
                    f"({first}, {end}) behind {last}"
                )
            last = end
        if sum(end - first for first, end in self.unused_tokens) == self.vocab_size:
            raise ValueError(f"unused_tokens are all {self.vocab_size} tokens there are")

    def _check_rotation(self) -> None:
        rotated = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if not 2 <= rotated <= self.head_dim or rotated % 2:
            raise ValueError(
                f"rotary_dim must be even and in [2, {self.head_dim}] (head_dim), got {rotated}"
            )
        scaling = self.rope_scaling
        if scaling is None or scaling.kind not in ("factors", "longrope"):
            return
        for factors in (scaling.factors, scaling.short_factors or scaling.factors):
            if len(factors) != rotated // 2:
                raise ValueError(
                    f"rope scaling has {len(factors)} factors, "
                    f"{rotated} rotated dimensions need {rotated // 2}"
                )

    def _check_layers(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, the model has "
                f"{self.num_hidden_layers} layers"
            )
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            raise ValueError("layer_types has sliding_attention, but there is no sliding_window")

    def _check_experts(self) -> None:
        if self.num_experts < 0:
            raise ValueError(f"num_experts must be at least 0, got {self.num_experts}")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be in [1, {self.num_experts}] (num_experts), "
                f"got {self.num_experts_per_tok}"
            )

    def served(self, max_model_len: int) -> "ModelConfig":
        """The model as it is computed where no text is longer than ``max_model_len`` tokens."""
        context = min(self.max_position_embeddings, max_model_len)
        return replace(self, max_position_embeddings=context)

    def window(self, layer: int) -> int | None:
        """Returns the number of tokens that a layer sees, its own included; None for all."""
        if self.layer_types and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens and their uses, as found in a checkpoint; what every kind of tokenizer has.

    ``tokens[i]`` is the string of token id i, "" where there is none. ``control_token_ids`` are
    special tokens that never appear in generated text; ``added_token_ids`` are matched whole in
    prompts but are ordinary text. ``add_bos_token``: prompts begin with ``bos_token_id``.
    ``add_space_prefix``: a space is put before every text, and taken from its beginning when tokens
    become text again. ``tool_template`` is for chats with tools, where there is one of its own.
    ``template_tokens``: what templates call tokens, and their strings: ("pad_token", "<pad>"); BOS
    and the first of EOS need not be among them.
    """

    tokens: tuple[str, ...]
    control_token_ids: tuple[int, ...] = ()
    added_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos_token: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    tool_template: str | None = None
    template_tokens: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec(Vocabulary):
    """A byte-level BPE tokenizer; tokens are in GPT-2's byte alphabet.

    ``merges`` are "left right" pairs in order of priority. ``pre_tokenizer`` is the name of a
    splitting rule, as in GGUF's ``tokenizer.ggml.pre``.
    """

    merges: tuple[str, ...]
    pre_tokenizer: str


@dataclass(frozen=True, kw_only=True)
class SentencePieceSpec(Vocabulary):
    """A BPE tokenizer of SentencePiece (Kudo and Richardson 2018) with byte fallback.

    Of two pairs of tokens that can be merged the one whose result has the higher of ``scores`` is.
    A space is U+2581. White space behind one of ``rstrip_token_ids`` in a prompt is dropped.
    """

    scores: tuple[float, ...]
    unknown_token_id: int
    rstrip_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenizerJson(Vocabulary):
    """A tokenizer as the ``tokenizer.json`` of a Hugging Face folder, ``text``, describes it.

    ``is_byte_level``: tokens are in GPT-2's byte alphabet; else SentencePiece's, as above. BOS is
    among what ``text`` says.
    """

    text: str
    is_byte_level: bool


AnyTokenizer = TokenizerSpec | SentencePieceSpec | TokenizerJson


# Paths of parameters, and the format of each (jaxinfer/weights).
MatrixFormats = tuple[tuple[tuple[str | int, ...], Any], ...]

# What a model may run in.
DTYPES = ("float32", "bfloat16")

# What keys and values may be held in; int8 and fp8 (e4m3) with a scale a token and head.
KV_DTYPES = (*DTYPES, "int8", "fp8")

# Rules by which a draft is accepted, see EngineConfig.
Verification = Literal["exact", "rejection"]
VERIFICATIONS: tuple[Verification, ...] = get_args(Verification)

# Far above what devices hold; EngineConfig refuses more.
MAX_PAGES = 1 << 24

# Of XLA. With more of them XLA:CPU divides the sums of a product between them, by a rule that looks
# at the number of rows: a row's bits would depend on its neighbours. Found so with 16, not with 2
# and 4.
MAX_CPU_THREADS = 4

# As the checkpoint stores them: a name of what is no format but many.
STORED = "checkpoint"


@dataclass(frozen=True)
class DtypePolicy:
    """Names of the dtypes a model runs in. Logits, softmax and norms are float32 everywhere.

    ``quantization``: name of the format of matrices (jaxinfer/weights), None for ``weights``;
    STORED for that of the checkpoint, where ``matrix_formats`` has the formats by parameters' paths
    (those that are not in it are in ``weights``).
    """

    weights: str
    activations: str
    kv_cache: str
    logits: str = "float32"
    quantization: str | None = None
    matrix_formats: MatrixFormats = ()

    @property
    def matrices(self) -> str:
        """Returns the format of the matrices, for people."""
        return self.quantization or self.weights

    @staticmethod
    def for_platform(
        platform: str, dtype: str | None = None, kv_dtype: str | None = None
    ) -> "DtypePolicy":
        """The stated policy: float32 on CPU (bit-exact rows), bfloat16 on TPU and GPU.

        ``dtype`` overrides weights, activations and KV cache together, ``kv_dtype`` (one of
        KV_DTYPES) the KV cache alone.
        """
        if dtype is None:
            dtype = "float32" if platform == "cpu" else "bfloat16"
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
        if kv_dtype is not None and kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
        return DtypePolicy(dtype, dtype, kv_dtype or dtype)


@dataclass(frozen=True)
class DraftModel:
    """A smaller model of the same vocabulary that drafts the next tokens of a larger one."""

    model: ModelConfig
    dtypes: DtypePolicy


# Of the fields of ``EngineConfig``, both included.
SIZE_LIMITS: Mapping[str, tuple[int, int]] = {
    "max_num_seqs": (1, 1024),
    "max_num_batched_tokens": (8, 65536),
    "max_model_len": (2, 1 << 20),
    "page_size": (1, 1024),
    "num_pages": (1, MAX_PAGES),
    "chunk_tile": (8, 512),
    "max_steps_per_call": (1, 256),
    "priority_seconds": (0, 86400),
    "steps_ahead": (0, 8),
    "num_drafts": (1, 31),
    "max_draft_seqs": (1, 64),
}


def check_size(name: str, value: float, fewest: int = 0) -> None:
    """Raises ``ValueError`` naming a field of ``SIZE_LIMITS``, its limits and its value.

    ``fewest``: a lower limit that is higher.
    """
    low, high = SIZE_LIMITS[name]
    low = max(low, fewest)
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. Tokens, pages and bytes; every array shape follows from these.

    ``max_num_seqs``: sequences that run at once (slots). ``max_num_batched_tokens``: prompt tokens
    of one step, in whole tiles of ``chunk_tile`` rows; decodes have rows of their own beside them.
    ``max_model_len``: longest prompt plus output. ``num_pages``: pages of ``page_size`` tokens in
    the KV cache. ``prefix_cache``: keep the pages of finished requests for prompts that begin
    alike. ``max_steps_per_call``: decode steps that run in one call of the device while nobody
    waits. ``priority_seconds``: how much longer a request waits than one of the next higher
    priority, before it goes first all the same. ``steps_ahead``: calls of the device that are sent
    before the one before them is read; 0 waits for each. ``batch_invariant``: on CPU in float32 a
    request's tokens do not depend on its neighbours, for which XLA's fastest kernels are left out.
    ``attention``: name of the backend, instead of the first that takes the case.

    ``draft``: who drafts tokens that the model then verifies, a name in ``jaxinfer.drafters``, None
    for nobody; ``num_draft_layers`` goes with those that are the model's first layers. At most
    ``num_drafts`` of a sequence in a step, and of at most ``max_draft_seqs`` sequences at once.
    ``adapt_drafts``: where drafts are measured not to pay, steps are plain. ``verify``: a draft is
    accepted if it is the model's own choice with the position's noise (exact, the tokens of plain
    decoding), or by rejection sampling (rejection, the same distribution, other tokens).
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_model_len: int = 2048
    page_size: int = 16
    num_pages: int = 2048
    chunk_tile: int = 64
    prefix_cache: bool = True
    max_steps_per_call: int = 1
    priority_seconds: float = 10.0
    steps_ahead: int = 1
    batch_invariant: bool = True
    attention: str | None = None
    draft: str | None = None
    num_draft_layers: int = 0
    num_drafts: int = 7
    max_draft_seqs: int = 8
    adapt_drafts: bool = True
    verify: Verification = "exact"

    def __post_init__(self) -> None:
        for name in SIZE_LIMITS:
            check_size(name, getattr(self, name))
        check_size("max_num_batched_tokens", self.max_num_batched_tokens, self.chunk_tile)
        if self.max_num_batched_tokens % self.chunk_tile:
            raise ValueError(
                f"max_num_batched_tokens must be a multiple of {self.chunk_tile} (chunk_tile), "
                f"got {self.max_num_batched_tokens}"
            )
        if self.drafter.takes_layers != (self.num_draft_layers > 0):
            raise ValueError(
                f"num_draft_layers must be 1 or more with draft=layers and 0 without, "
                f"got {self.num_draft_layers} with draft={self.draft}"
            )
        # A block of KV tokens is a whole number of pages, the same number of tokens for all sizes.
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {self.page_size}")
        if self.num_pages * self.page_size < self.max_model_len:
            raise ValueError(
                f"the KV cache holds {self.num_pages * self.page_size} tokens, fewer than "
                f"max_model_len ({self.max_model_len}): raise --kv-memory or lower --max-model-len"
            )

    @property
    def drafter(self) -> DrafterTraits:
        """Returns the traits of the drafter; all else asks them, and never the name."""
        return drafter_traits(self.draft)

    @property
    def most_drafts(self) -> int:
        """Returns how many drafts of a sequence a step may verify, 0 where nobody drafts."""
        return 0 if self.drafter is NOBODY else self.num_drafts

    @property
    def tile_counts(self) -> tuple[int, ...]:
        """Returns the numbers of chunk tiles that compiled steps have besides 0, smallest first."""
        most = self.max_num_batched_tokens // self.chunk_tile
        return tuple(sorted({1, max(1, most // 4), most}))

    @property
    def max_pages_per_sequence(self) -> int:
        """P: width of the page table."""
        return -(-self.max_model_len // self.page_size)

    @property
    def max_pages_of_slots(self) -> int:
        """Returns how many pages all slots together can hold at once."""
        return self.max_num_seqs * self.max_pages_per_sequence
