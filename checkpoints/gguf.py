"""A GGUF file as a checkpoint: its model, its tokenizer, its tensors by canonical name.

Only architecture ``llama`` (Llama 2 and 3, Mistral's dense models, SmolLM). What the file says
about the model is checked against the tensors that are there; a tensor or a setting that would
change the computation in a way the model does not know is refused, never ignored.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from checkpoints.gguf_blocks import dequantize_columns, dequantize_rows
from checkpoints.gguf_file import GGUFFile
from jaxinfer.config import ModelConfig, RopeScaling, TokenizerSpec

# Architectures as in "general.architecture", with our name of the family.
ARCHITECTURES = {"llama": "llama"}

_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4
_MAX_POSITIONS = 1 << 30

# Canonical name -> GGUF name.
_MODEL_TENSORS = {
    "embed_tokens": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_LAYER_TENSORS = {
    "input_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "post_attention_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFCheckpoint:
    """A GGUF file opened for loading: ``model``, ``tokenizer`` and ``tensor(name)``.

    Raises ``ValueError`` when the file is damaged, or describes a model that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._metadata = self._file.metadata
        with _named(path):
            self._architecture = self._get("general.architecture", str)
            if self._architecture not in ARCHITECTURES:
                raise ValueError(
                    f"architecture {self._architecture!r} is not supported; "
                    f"supported are {', '.join(sorted(ARCHITECTURES))}"
                )
            self.model = self._read_model()
            self._shapes = canonical_shapes(self.model)
            self._names = {name: _gguf_name(name) for name in self._shapes}
            self._check_tensors()

    @property
    def tokenizer(self) -> TokenizerSpec:
        """The tokenizer. Raises ``ValueError`` when there is none, or not a byte-level BPE."""
        with _named(self._file.path):
            return self._read_tokenizer()

    def tensor(self, name: str) -> np.ndarray:
        """Returns a tensor as float32 in Hugging Face's orientation, ``[out, in]``.

        Canonical names: ``embed_tokens``, ``norm``, ``lm_head`` and ``layers.{i}.`` ``input_norm``,
        ``q``, ``k``, ``v``, ``o``, ``post_attention_norm``, ``gate``, ``up``, ``down``. The rows of
        ``q`` and ``k`` are in the order of rotate-half rotary embedding. Projections come as the
        transpose of a contiguous ``[in, out]`` array. Raises ``ValueError`` for other names.
        """
        if name not in self._names:
            raise ValueError(f"no tensor {name!r} in {self._file.path}")
        gguf_name = self._names[name]
        data = self._file.tensor_bytes(gguf_name)
        tensor_type = self._file.tensors[gguf_name].type
        shape = self._shapes[name]
        # A tied embedding is wanted as the head that it also is.
        is_lookup = name == "embed_tokens" and not self.model.tie_word_embeddings
        if is_lookup or len(shape) == 1:
            return dequantize_rows(data, tensor_type).reshape(shape)
        if name.endswith((".q", ".k")):
            data = _unpermute_rows(data, self.model.head_dim)
        return dequantize_columns(data, tensor_type).T

    def _get[T: (int, float, str, bool)](
        self, key: str, kind: type[T], default: T | None = None
    ) -> T:
        """Returns a metadata value of the wanted type, ``default`` when it is absent."""
        value = self._metadata.get(key, default)
        if value is None:
            raise ValueError(f"metadata key {key!r} is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or type(value) is not kind:
            raise ValueError(
                f"metadata key {key!r} must be of type {kind.__name__}, got {type(value).__name__}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"metadata key {key!r} must be finite, got {value}")
        return value

    def _read_model(self) -> ModelConfig:
        prefix = self._architecture
        hidden_size = self._get(f"{prefix}.embedding_length", int)
        num_heads = self._get(f"{prefix}.attention.head_count", int)
        if not 1 <= num_heads <= hidden_size:
            raise ValueError(
                f"{prefix}.attention.head_count must be in [1, {hidden_size}], got {num_heads}"
            )
        head_dim = self._get(f"{prefix}.attention.key_length", int, hidden_size // num_heads)
        for key, expected in (
            ("attention.value_length", head_dim),
            ("rope.dimension_count", head_dim),
            ("expert_count", 0),
        ):
            value = self._get(f"{prefix}.{key}", int, expected)
            if value != expected:
                raise ValueError(f"{prefix}.{key} is {value}; only {expected} is supported here")
        max_positions = self._get(f"{prefix}.context_length", int)
        if max_positions > _MAX_POSITIONS:
            raise ValueError(
                f"{prefix}.context_length is {max_positions}, more than {_MAX_POSITIONS}"
            )
        num_layers = self._get(f"{prefix}.block_count", int)
        if num_layers > len(self._file.tensors):
            raise ValueError(
                f"{prefix}.block_count is {num_layers}, but the file has only "
                f"{len(self._file.tensors)} tensors"
            )
        embedding = self._file.tensors.get(_MODEL_TENSORS["embed_tokens"])
        if embedding is None:
            raise ValueError(f"tensor {_MODEL_TENSORS['embed_tokens']!r} is missing")
        return ModelConfig(
            architecture=ARCHITECTURES[self._architecture],
            vocab_size=embedding.shape[0],
            hidden_size=hidden_size,
            intermediate_size=self._get(f"{prefix}.feed_forward_length", int),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=self._get(f"{prefix}.attention.head_count_kv", int, num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=self._get(f"{prefix}.attention.layer_norm_rms_epsilon", float),
            rope_theta=self._get(f"{prefix}.rope.freq_base", float, 10000.0),
            rope_scaling=self._read_rope_scaling(),
            tie_word_embeddings=_MODEL_TENSORS["lm_head"] not in self._file.tensors,
        )

    def _read_rope_scaling(self) -> RopeScaling | None:
        prefix = f"{self._architecture}.rope"
        kind = self._get(f"{prefix}.scaling.type", str, "linear")
        if kind not in ("none", "linear"):
            raise ValueError(f"{prefix}.scaling.type is {kind!r}; supported are none and linear")
        factor = self._get(f"{prefix}.scaling.factor", float, 1.0) if kind == "linear" else 1.0
        if factor == 0:  # llama.cpp's way to say that there is none
            factor = 1.0
        if factor < 0:
            raise ValueError(f"{prefix}.scaling.factor must be positive, got {factor}")
        linear = RopeScaling("linear", factor=factor) if factor != 1 else None
        if _ROPE_FACTORS not in self._file.tensors:
            return linear
        if linear:
            raise ValueError(f"both {prefix}.scaling.factor and {_ROPE_FACTORS}; one is supported")
        data = self._file.tensor_bytes(_ROPE_FACTORS)
        factors = dequantize_rows(data, self._file.tensors[_ROPE_FACTORS].type).reshape(-1)
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise ValueError(f"{_ROPE_FACTORS} must hold positive, finite numbers")
        return RopeScaling("factors", factors=tuple(factors.tolist()))

    def _check_tensors(self) -> None:
        """Every tensor the model needs is there in its shape, and there is no other."""
        for name, shape in self._shapes.items():
            info = self._file.tensors.get(self._names[name])
            if info is None:
                raise ValueError(f"tensor {self._names[name]!r} is missing")
            if info.shape != shape:
                raise ValueError(
                    f"tensor {info.name!r} has shape {info.shape}, the model needs {shape}"
                )
        unknown = sorted(self._file.tensors.keys() - set(self._names.values()) - {_ROPE_FACTORS})
        if unknown:
            raise ValueError(
                f"{len(unknown)} tensors that a {self._architecture} model does not have, "
                f"{unknown[0]!r} the first"
            )

    def _read_tokenizer(self) -> TokenizerSpec:
        kind = self._get("tokenizer.ggml.model", str)
        if kind != "gpt2":
            raise ValueError(
                f"tokenizer {kind!r} is not supported; supported is gpt2 (byte-level BPE)"
            )
        tokens = self._strings("tokenizer.ggml.tokens")
        if len(tokens) > self.model.vocab_size:
            raise ValueError(
                f"{len(tokens)} tokens, but the embedding has {self.model.vocab_size} rows"
            )
        token_types = self._metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens)))
        if not isinstance(token_types, np.ndarray) or len(token_types) != len(tokens):
            raise ValueError(f"tokenizer.ggml.token_type must be {len(tokens)} numbers")
        token_types = np.asarray(token_types)
        pre_tokenizer = self._get("tokenizer.ggml.pre", str)
        end_ids = (self._token_id(end, len(tokens)) for end in ("eos", "eot"))
        chat_template = self._metadata.get("tokenizer.chat_template")
        return TokenizerSpec(
            tokens=tokens,
            merges=self._strings("tokenizer.ggml.merges"),
            pre_tokenizer=pre_tokenizer,
            control_token_ids=tuple(np.flatnonzero(token_types == _CONTROL_TOKEN).tolist()),
            added_token_ids=tuple(np.flatnonzero(token_types == _USER_DEFINED_TOKEN).tolist()),
            bos_token_id=self._token_id("bos", len(tokens)),
            eos_token_ids=tuple(dict.fromkeys(end for end in end_ids if end is not None)),
            # llama.cpp's default goes by the pre-tokenizer: Llama 3 files often leave it out.
            add_bos_token=self._get(
                "tokenizer.ggml.add_bos_token", bool, pre_tokenizer == "llama-bpe"
            ),
            chat_template=None
            if chat_template is None
            else self._get("tokenizer.chat_template", str),
        )

    def _token_id(self, name: str, num_tokens: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self._metadata:
            return None
        token_id = self._get(key, int)
        if not 0 <= token_id < num_tokens:
            raise ValueError(f"{key} must be in [0, {num_tokens - 1}], got {token_id}")
        return token_id

    def _strings(self, key: str) -> tuple[str, ...]:
        value = self._metadata.get(key)
        if not isinstance(value, tuple):
            raise ValueError(f"metadata key {key!r} must be an array of strings")
        return value


def canonical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape, ``[out, in]`` for a matrix, of every tensor a Llama has, by name."""
    embed, ffn = model.hidden_size, model.intermediate_size
    query = model.num_attention_heads * model.head_dim
    key_value = model.num_key_value_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (model.vocab_size, embed),
        "norm": (embed,),
    }
    if not model.tie_word_embeddings:
        shapes["lm_head"] = (model.vocab_size, embed)
    for layer in range(model.num_hidden_layers):
        for part, shape in {
            "input_norm": (embed,),
            "q": (query, embed),
            "k": (key_value, embed),
            "v": (key_value, embed),
            "o": (embed, query),
            "post_attention_norm": (embed,),
            "gate": (ffn, embed),
            "up": (ffn, embed),
            "down": (embed, ffn),
        }.items():
            shapes[f"layers.{layer}.{part}"] = shape
    return shapes


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the file's name before whatever is wrong with what it says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _gguf_name(name: str) -> str:
    if not name.startswith("layers."):
        return _MODEL_TENSORS[name]
    _, layer, part = name.split(".")
    return f"blk.{layer}.{_LAYER_TENSORS[part]}"


def _unpermute_rows(data: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes the order of Q and K rows that llama.cpp's converter gives to a Llama.

    There, rows of a head are pairs (i, i + D/2) for neighbouring-pair rotation; rotate-half wants
    all first halves, then all second halves. Works on ``[heads * D, bytes of a row]``.
    """
    pairs = data.reshape(-1, head_dim // 2, 2, data.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(data.shape)
