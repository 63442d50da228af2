"""What a model, its tokenizer and an engine are, as frozen values. Host only: never imports JAX.

Field names are those of a Hugging Face ``config.json`` where one exists.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    ``linear`` divides every frequency by ``factor``. ``llama3`` is the smooth rule of Llama 3.1
    (Grattafiori et al. 2024; ``rope_type: llama3`` in Hugging Face configurations). ``factors``
    divides frequency i by ``factors[i]``, which is how GGUF stores an already evaluated rule.
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer. ``architecture`` picks its module in models/."""

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
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta}")
        scaling = self.rope_scaling
        if scaling and scaling.kind == "factors" and len(scaling.factors) != self.head_dim // 2:
            raise ValueError(
                f"rope scaling has {len(scaling.factors)} factors, "
                f"head_dim {self.head_dim} needs {self.head_dim // 2}"
            )


@dataclass(frozen=True)
class TokenizerSpec:
    """A byte-level BPE tokenizer as found in a checkpoint; serving/tokenizer.py builds it.

    ``tokens[i]`` is the string of token id i in GPT-2's byte alphabet. ``control_token_ids`` are
    special tokens that never appear in generated text; ``added_token_ids`` are matched whole in
    prompts but are ordinary text. ``merges`` are "left right" pairs in order of priority.
    ``pre_tokenizer`` is the name of a splitting rule, as in GGUF's ``tokenizer.ggml.pre``.
    """

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    pre_tokenizer: str
    control_token_ids: tuple[int, ...] = ()
    added_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos_token: bool = False
    chat_template: str | None = None


@dataclass(frozen=True)
class DtypePolicy:
    """Names of the dtypes a model runs in. Logits, softmax and norms are float32 everywhere."""

    weights: str
    activations: str
    kv_cache: str
    logits: str = "float32"

    @staticmethod
    def for_platform(platform: str, dtype: str | None = None) -> "DtypePolicy":
        """The stated policy: float32 on CPU (bit-exact rows), bfloat16 on TPU and GPU.

        ``dtype`` overrides weights, activations and KV cache together.
        """
        if dtype is None:
            dtype = "float32" if platform == "cpu" else "bfloat16"
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
        return DtypePolicy(weights=dtype, activations=dtype, kv_cache=dtype)


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

    def __post_init__(self) -> None:
        limits = {
            "max_num_seqs": (1, 1024),
            "max_num_batched_tokens": (self.chunk_tile, 65536),
            "max_model_len": (2, 1 << 20),
            "page_size": (1, 1024),
            "num_pages": (1, 1 << 24),
            "chunk_tile": (8, 512),
            "max_steps_per_call": (1, 256),
            "priority_seconds": (0, 86400),
            "steps_ahead": (0, 8),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} must be between {low} and {high}, got {getattr(self, name)}"
                )
        if self.max_num_batched_tokens % self.chunk_tile:
            raise ValueError(
                f"max_num_batched_tokens must be a multiple of {self.chunk_tile} (chunk_tile), "
                f"got {self.max_num_batched_tokens}"
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
    def tile_counts(self) -> tuple[int, ...]:
        """How many chunk tiles a compiled step may have, smallest first; 0 besides."""
        most = self.max_num_batched_tokens // self.chunk_tile
        return tuple(sorted({1, max(1, most // 4), most}))

    @property
    def max_pages_per_sequence(self) -> int:
        """P: width of the page table."""
        return -(-self.max_model_len // self.page_size)
