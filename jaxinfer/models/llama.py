"""The Llama family: Llama 2, 3, 3.x, SmolLM2.

Axis letters: T rows, R logits rows, E embed, G kv heads, D head dim, F ffn, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.models import layers
from jaxinfer.sharding import num_tensor_devices, physical_model
from pallas_kernels.ragged_paged_attention import KVPages, RaggedBatch, ragged_paged_attention

RopeTables = tuple[jax.Array, jax.Array]


class LlamaLayer(nnx.Module):
    """Attention and gated MLP, each behind a norm and added to the residual stream.

    ``model`` has physical shapes. Activations are split over kv heads, then over ffn, between the
    products that read and write the residual stream, which every device holds whole: the sums after
    ``o_proj`` and ``down_proj`` are the layer's only exchanges.
    """

    def __init__(
        self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs, mesh: Mesh | None
    ) -> None:
        embed, ffn, head_dim = model.hidden_size, model.intermediate_size, model.head_dim
        kv_heads = model.num_key_value_heads
        group = model.num_attention_heads // kv_heads
        dtype = dtypes.weights
        self.model, self.mesh = model, mesh
        self.input_norm = layers.norm_scale(embed)
        # For each kv head its query heads, its key and its value: one product, split by kv head.
        self.qkv = layers.parameter(
            rngs,
            (embed, kv_heads, group + 2, head_dim),
            dtype,
            ("embed", "kv_heads", None, None),
            fan_in=embed,
        )
        self.o_proj = layers.parameter(
            rngs,
            (kv_heads, group, head_dim, embed),
            dtype,
            ("kv_heads", None, None, "embed"),
            fan_in=kv_heads * group * head_dim,
        )
        self.post_attention_norm = layers.norm_scale(embed)
        self.gate_up = layers.parameter(
            rngs, (embed, 2, ffn), dtype, ("embed", None, "ffn"), fan_in=embed
        )
        self.down_proj = layers.parameter(rngs, (ffn, embed), dtype, ("ffn", "embed"), fan_in=ffn)

    def __call__(
        self, x: jax.Array, rope: RopeTables, kv_pages: KVPages, batch: RaggedBatch
    ) -> tuple[jax.Array, KVPages]:
        """[T, E] -> [T, E] and the pages with this step's keys and values in them."""
        model = self.model
        rows, head_dim = x.shape[0], model.head_dim
        normed = layers.rms_norm(x, self.input_norm[...], model.rms_norm_eps)
        qkv = layers.linear(normed, self.qkv[...])  # [T, G, heads per kv head + 2, D]
        queries = qkv[:, :, :-2].reshape(rows, model.num_attention_heads, head_dim)
        attention = functools.partial(ragged_paged_attention, scale=head_dim**-0.5)
        attended, kv_pages = layers.split_over_kv_heads(attention, self.mesh)(
            layers.apply_rope(queries, rope),
            layers.apply_rope(qkv[:, :, -2], rope),
            qkv[:, :, -1],
            kv_pages,
            batch,
        )
        attended = attended.reshape(rows, model.num_key_value_heads, -1, head_dim)
        x = x + layers.linear(attended, self.o_proj[...], num_axes=3)
        normed = layers.rms_norm(x, self.post_attention_norm[...], model.rms_norm_eps)
        gate_up = layers.linear(normed, self.gate_up[...])  # [T, 2, F]
        hidden = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
        return x + layers.linear(hidden, self.down_proj[...]), kv_pages


class Llama(nnx.Module):
    """Token ids to hidden states over a paged KV cache, and hidden states to logits."""

    def __init__(
        self, model: ModelConfig, dtypes: DtypePolicy, rngs: nnx.Rngs, mesh: Mesh | None
    ) -> None:
        self.model, self.dtypes, self.mesh = model, dtypes, mesh
        physical = physical_model(model, num_tensor_devices(mesh))
        self.layers = nnx.List(
            [LlamaLayer(physical, dtypes, rngs, mesh) for _ in range(model.num_hidden_layers)]
        )
        self.norm = layers.norm_scale(model.hidden_size)
        embed, vocab = physical.hidden_size, physical.vocab_size
        self.lm_head = layers.parameter(
            rngs, (embed, vocab), dtypes.weights, ("embed", "vocab"), fan_in=embed
        )
        # A tied embedding is the head's columns: the head is read whole in every step and must
        # lie as its product wants it ([V, E] takes 3.5 times as long on XLA:CPU), rows are few.
        if not model.tie_word_embeddings:
            self.embed_tokens = layers.parameter(
                rngs, (vocab, embed), dtypes.weights, ("vocab", "embed"), fan_in=embed
            )

    def __call__(
        self, token_ids: jax.Array, kv_pages: tuple[KVPages, ...], batch: RaggedBatch
    ) -> tuple[jax.Array, tuple[KVPages, ...]]:
        """``token_ids`` [T] -> normed hidden states [T, E] and the pages, new tokens included."""
        if self.model.tie_word_embeddings:
            x = self.lm_head[...][:, token_ids].T
        else:
            x = self.embed_tokens[...][token_ids]
        x = x.astype(self.dtypes.activations)
        rope = layers.rope_tables(batch.positions(), self.model)
        written = []
        for layer, pages in zip(self.layers, kv_pages, strict=True):
            x, pages = layers.traced_once(layer, x, rope, pages, batch)
            written.append(pages)
        return layers.rms_norm(x, self.norm[...], self.model.rms_norm_eps), tuple(written)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, E] -> [R, V] float32, whole on every device."""
        logits = jnp.dot(hidden, self.lm_head[...], preferred_element_type=jnp.float32)
        # The one gather of a step: each device has the columns of its part of the vocabulary, and
        # sampling, which looks at all of them many times, is then the same on every device. Columns
        # that only fill up the last part are zeros and must not be chosen: they end here.
        logits = layers.gathered(logits, (None, "vocab"), self.mesh)
        return logits[:, : self.model.vocab_size]
