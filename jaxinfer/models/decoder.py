"""The decoder-only transformer that the families are: embedding, layers, head.

A family's file says what its layers are. Axis letters: T rows, R logits rows, E embed, V vocab.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxinfer import weights
from jaxinfer.config import DtypePolicy, ModelConfig
from jaxinfer.declaration import Declaration, Sources
from jaxinfer.models import layers
from jaxinfer.models.attention import Attention
from jaxinfer.models.rotary import RopeTables, rope_tables
from jaxinfer.sharding import num_tensor_devices, physical_model
from jaxinfer.weights import MatrixPath
from pallas_kernels.ragged_paged_attention import KVPages, RaggedBatch


class PreNormLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): Llama's layer and that of most families.

    Activations are split over kv heads, then over ffn or experts, between the products that read
    and write the residual stream, which every device holds whole: the sums at the end of attention
    and MLP are the layer's only exchanges.
    """

    # Matrices whose inputs come from a norm, and which: a factor can move from one to the other.
    norms: ClassVar[Mapping[MatrixPath, str]] = {
        ("attention", "qkv"): "input_norm",
        ("mlp", "gate_up"): "post_attention_norm",
    }

    def __init__(self, model: ModelConfig, attention: Attention, mlp: nnx.Module) -> None:
        self.epsilon = model.rms_norm_eps
        self.input_norm = layers.norm_scale(model.hidden_size)
        self.attention = attention
        self.post_attention_norm = layers.norm_scale(model.hidden_size)
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, rope: RopeTables, kv_pages: KVPages, batch: RaggedBatch
    ) -> tuple[jax.Array, KVPages]:
        """[T, E] -> [T, E] and the pages with this step's keys and values in them."""
        normed = layers.rms_norm(x, self.input_norm[...], self.epsilon)
        attended, kv_pages = self.attention(normed, rope, kv_pages, batch)
        x = x + attended
        normed = layers.rms_norm(x, self.post_attention_norm[...], self.epsilon)
        return x + self.mlp(normed), kv_pages


# A family's layer: (physical model, number of the layer) -> its module.
MakeLayer = Callable[[ModelConfig, int], nnx.Module]


class Decoder(nnx.Module):
    """Token ids to hidden states over a paged KV cache, and hidden states to logits.

    ``make_layer`` is called with physical shapes. ``embedding_scale`` multiplies embeddings.
    """

    def __init__(
        self,
        model: ModelConfig,
        dtypes: DtypePolicy,
        rngs: nnx.Rngs,
        mesh: Mesh | None,
        make_layer: MakeLayer,
        embedding_scale: float | None = None,
    ) -> None:
        self.model, self.dtypes, self.mesh = model, dtypes, mesh
        self.embedding_scale = embedding_scale
        physical = physical_model(model, num_tensor_devices(mesh))
        self.layers = nnx.List(
            [make_layer(physical, layer) for layer in range(model.num_hidden_layers)]
        )
        self.norm = layers.norm_scale(model.hidden_size)
        embed, vocab = physical.hidden_size, physical.vocab_size
        is_tied = model.tie_word_embeddings
        sources = Sources(("embed_tokens" if is_tied else "lm_head",))
        head = Declaration((embed, vocab), ("embed", "vocab"), (0,), sources)
        self.lm_head = weights.declare(rngs, dtypes, head)
        # A tied embedding is the head's columns: the head is read whole in every step and must
        # lie as its product wants it ([V, E] takes 3.5 times as long on XLA:CPU), rows are few.
        if not is_tied:
            rows = Declaration((vocab, embed), ("vocab", "embed"), (1,))
            self.embed_tokens = weights.declare(rngs, dtypes, rows)

    def __call__(
        self, token_ids: jax.Array, kv_pages: tuple[KVPages, ...], batch: RaggedBatch
    ) -> tuple[jax.Array, tuple[KVPages, ...]]:
        """``token_ids`` [T] -> normed hidden states [T, E] and the pages, new tokens included.

        As many layers compute as there are ``kv_pages``, the first ones: all of them, or those that
        draft for the others.
        """
        x, ropes = self.embed(token_ids), self.ropes(batch.positions())
        written = []
        used = len(kv_pages)
        for layer, rope, pages in zip(self.layers[:used], ropes[:used], kv_pages, strict=True):
            x, pages = layers.traced_once(layer, x, rope, pages, batch)
            written.append(pages)
        return self.normed(x), tuple(written)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, E] -> [R, V] float32, whole on every device; -inf for what is no token."""
        logits = weights.product(hidden, weights.matrix(self.lm_head))
        # The one gather of a step: each device has the columns of its part of the vocabulary, and
        # sampling, which looks at all of them many times, is then the same on every device. Columns
        # that only fill up the last part are zeros and must not be chosen: they end here.
        logits = layers.gathered(logits, (None, "vocab"), self.mesh)
        return layers.without_unused(logits[:, : self.model.vocab_size], self.model)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """[T] -> [T, E], what the first layer gets."""
        if self.model.tie_word_embeddings:
            x = weights.outputs(weights.matrix(self.lm_head), token_ids, axis=1)
        else:
            x = weights.outputs(weights.matrix(self.embed_tokens), token_ids, axis=0)
        x = x.astype(self.dtypes.activations)
        if self.embedding_scale is None:
            return x
        # Rounded to the activations' dtype first, as the checkpoints were trained.
        return x * jnp.asarray(self.embedding_scale, x.dtype)

    def ropes(self, positions: jax.Array) -> list[RopeTables]:
        """Returns each layer's tables of ``positions`` [T]; some rotate by angles of their own."""
        model = self.model
        is_local = [
            model.local_rope_theta is not None and model.window(layer) is not None
            for layer in range(len(self.layers))
        ]
        tables = {local: rope_tables(positions, model, local) for local in set(is_local)}
        return [tables[local] for local in is_local]

    def normed(self, x: jax.Array) -> jax.Array:
        """[T, E] -> [T, E]: what the last layer made, as the head gets it."""
        return layers.rms_norm(x, self.norm[...], self.model.rms_norm_eps)
