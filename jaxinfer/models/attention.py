"""Self-attention over a paged KV cache, with what families put into it.

Axis letters: T rows, E embed, G kv heads, R query heads of a kv head, D head dim.
"""

import functools
from dataclasses import dataclass, replace

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxinfer import weights
from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.declaration import Declaration, Sources
from jaxinfer.models import layers
from jaxinfer.models.rotary import RopeTables, apply_rope
from pallas_kernels.ragged_paged_attention import KVPages, RaggedBatch, ragged_paged_attention


@dataclass(frozen=True)
class AttentionKind:
    """A layer's own: ``window`` tokens that a row sees, its own included, None for all; biases of
    queries, keys and values; queries and keys normed by head before they are rotated.
    """

    window: int | None = None
    has_bias: bool = False
    has_qk_norm: bool = False


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions.

    ``model`` has physical shapes.
    """

    def __init__(
        self,
        model: ModelConfig,
        dtypes: DtypePolicy,
        rngs: nnx.Rngs,
        mesh: Mesh | None,
        kind: AttentionKind,
    ) -> None:
        embed, head_dim, kv_heads = model.hidden_size, model.head_dim, model.num_key_value_heads
        group = model.num_attention_heads // kv_heads
        self.model, self.mesh, self.window = model, mesh, kind.window
        # For each kv head its query heads, its key and its value: one product, split by kv head.
        shape, axes = (kv_heads, group + 2, head_dim), ("kv_heads", "heads_and_kv", "head_dim")
        sources = Sources(("q", "k", "v"), "heads_and_kv", (group, 1, 1))
        qkv = Declaration((embed, *shape), ("embed", *axes), (0,), sources)
        self.qkv = weights.declare(rngs, dtypes, qkv)
        o_proj = Declaration(
            (kv_heads, group, head_dim, embed),
            ("kv_heads", "heads", "head_dim", "embed"),
            (0, 1, 2),
            Sources(("o",)),
        )
        self.o_proj = weights.declare(rngs, dtypes, o_proj)
        self.has_bias, self.has_qk_norm = kind.has_bias, kind.has_qk_norm
        if kind.has_bias:
            sources = replace(sources, names=("q_bias", "k_bias", "v_bias"))
            bias = Declaration(shape, axes, sources=sources)
            self.qkv_bias = layers.parameter(rngs, bias, "float32", fan_in=embed)
        if kind.has_qk_norm:
            self.q_norm = layers.norm_scale(head_dim, axis=None)
            self.k_norm = layers.norm_scale(head_dim, axis=None)

    def __call__(
        self, x: jax.Array, rope: RopeTables, kv_pages: KVPages, batch: RaggedBatch
    ) -> tuple[jax.Array, KVPages]:
        """[T, E] -> [T, E] and the pages with this step's keys and values in them."""
        model, rows = self.model, x.shape[0]
        queries, keys, values = self._queries_keys_values(x)
        scalar = model.query_pre_attn_scalar or model.head_dim
        attention = functools.partial(
            ragged_paged_attention, scale=scalar**-0.5, sliding_window=self.window
        )
        attended, kv_pages = layers.split_over_kv_heads(attention, self.mesh)(
            apply_rope(queries, rope), apply_rope(keys, rope), values, kv_pages, batch
        )
        attended = attended.reshape(rows, model.num_key_value_heads, -1, model.head_dim)
        return layers.linear(attended, self.o_proj), kv_pages

    def _queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[T, G R, D], [T, G, D] and [T, G, D]."""
        model = self.model
        # [T, G, R + 2, D]
        if self.has_bias:
            qkv = layers.linear(x, self.qkv, self.qkv_bias[...])
        else:
            qkv = layers.linear(x, self.qkv)
        queries, keys = qkv[:, :, :-2], qkv[:, :, -2]
        if self.has_qk_norm:
            queries = layers.rms_norm(queries, self.q_norm[...], model.rms_norm_eps)
            keys = layers.rms_norm(keys, self.k_norm[...], model.rms_norm_eps)
        queries = queries.reshape(x.shape[0], model.num_attention_heads, model.head_dim)
        return queries, keys, qkv[:, :, -1]
