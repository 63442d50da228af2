"""An estimate of speed from what a step reads and computes, and a chip's peaks: no measurement."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from jaxinfer.engine_spec import EngineSpec
from jaxinfer.kv_cache import page_bytes
from jaxinfer.sharding import physical_model
from jaxinfer_entrypoints.machine.tpu_targets import TpuGeneration
from jaxinfer_entrypoints.memory.plan import parameter_bytes


@dataclass(frozen=True)
class Roofline:
    """Seconds are the longer of reading at the peak bandwidth and computing at the peak rate.

    Left out: exchanges between chips, sampling, the host, and whatever keeps a program from its
    peaks. Real ones are slower (Williams, Waterman and Patterson 2009).
    """

    spec: EngineSpec
    peaks: TpuGeneration

    def decode_seconds(self, num_sequences: int, length: int) -> float:
        """One token for each of ``num_sequences`` of ``length`` tokens."""
        num_bytes = self._weight_bytes(num_sequences) + num_sequences * length * self._token_bytes()
        return self._seconds(num_bytes, num_sequences * self._flops_of_token(length))

    def prefill_seconds(self, num_tokens: int) -> float:
        """A prompt of ``num_tokens``, alone, in chunks of ``max_num_batched_tokens``."""
        seconds, chunk = 0.0, self.spec.config.max_num_batched_tokens
        for start in range(0, num_tokens, chunk):
            rows = min(chunk, num_tokens - start)
            num_bytes = self._weight_bytes(rows) + (start + rows) * self._token_bytes()
            # On average a row of the chunk sees what is before it and half of the chunk.
            seconds += self._seconds(num_bytes, rows * self._flops_of_token(start + rows / 2))
        return seconds

    def _seconds(self, num_bytes: float, num_flops: float) -> float:
        """``num_bytes`` and ``num_flops`` of one chip."""
        return max(
            num_bytes / self.peaks.hbm_bytes_per_second,
            num_flops / self.peaks.bf16_flops_per_second,
        )

    def _weight_bytes(self, rows: float) -> float:
        """Counts what a step of ``rows`` reads of a chip's weights, experts chosen evenly.

        All but an embedding table, of which few rows, and experts that no row wants.
        """
        read = (
            parameter_bytes(self.spec.model, self.spec.dtypes, self.spec.mesh)
            - self._embedding_bytes()
        )
        if not self.spec.model.num_experts:
            return read
        unwanted = (1 - self._chosen) ** rows
        return read - unwanted * self._expert_bytes()

    @property
    def _chosen(self) -> float:
        """The part of the experts that a token takes."""
        return self.spec.model.num_experts_per_tok / self.spec.model.num_experts

    def _expert_bytes(self) -> float:
        """Counts the bytes of all experts on one chip."""
        physical = physical_model(self.spec.model, self.spec.mesh.size)
        size = 3 * physical.hidden_size * physical.intermediate_size * physical.num_experts
        return physical.num_hidden_layers * size * self._itemsize / self.spec.mesh.size

    def _embedding_bytes(self) -> float:
        if self.spec.model.tie_word_embeddings:
            return 0
        physical = physical_model(self.spec.model, self.spec.mesh.size)
        size = physical.vocab_size * physical.hidden_size // self.spec.mesh.size
        return size * self._itemsize

    @property
    def _itemsize(self) -> float:
        """Bytes of a matrix's number, its part of the scales included."""
        plain = dataclasses.replace(self.spec.dtypes, quantization=None, matrix_formats=())
        whole = parameter_bytes(self.spec.model, plain, self.spec.mesh)
        own = parameter_bytes(self.spec.model, self.spec.dtypes, self.spec.mesh)
        return own / whole * jnp.dtype(self.spec.dtypes.weights).itemsize

    def _token_bytes(self) -> float:
        """Keys and values of one token on one chip."""
        size = page_bytes(
            self.spec.model,
            self.spec.config.page_size,
            self.spec.dtypes.kv_cache,
            self.spec.mesh,
            self.spec.config.attention,
        )
        return size / self.spec.config.page_size / self.spec.mesh.size

    def _flops_of_token(self, length: float) -> float:
        """Multiplications and additions of a token that sees ``length`` others, on one chip."""
        physical = physical_model(self.spec.model, self.spec.mesh.size)
        read = (
            parameter_bytes(self.spec.model, self.spec.dtypes, self.spec.mesh)
            - self._embedding_bytes()
        )
        if self.spec.model.num_experts:
            read -= (1 - self._chosen) * self._expert_bytes()
        products = 2 * read / self._itemsize
        heads = physical.num_attention_heads * physical.head_dim / self.spec.mesh.size
        return products + 4 * length * heads * physical.num_hidden_layers
