"""Products with matrices of integers that every backend is shown with, and how near is near."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import grouped_matmul, int8_matmul
from pallas_kernels.quantized_matmul.nibbles import pack_nibbles


@dataclass(frozen=True)
class Int8Case:
    """Rows, axes of inputs and of outputs, and activations. ``declined``: why, by the kernel."""

    name: str
    rows: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bits: int
    group: int | None = None
    dtype: str = "float32"
    declined: str | None = None

    def draw(self) -> tuple[Any, ...]:
        """Rows of very different sizes, one of them zeros, and one output of zeros."""
        random = np.random.default_rng(self.rows)
        x = random.standard_normal((self.rows, *self.inputs))
        x *= 10.0 ** random.integers(-6, 6, (self.rows, *[1] * len(self.inputs)))
        x[self.rows // 2] *= self.rows > 2
        values = random.integers(-127, 128, (*self.outputs, *self.inputs)).astype(np.int8)
        scales = random.random(self.outputs).astype(np.float32)
        scales.flat[0] = 0
        return jnp.asarray(x, self.dtype), jnp.asarray(values), jnp.asarray(scales)

    def multiply(self, arrays: tuple[Any, ...], backend: str | None) -> np.ndarray:
        return np.asarray(
            int8_matmul(
                *arrays, activation_bits=self.bits, activation_group=self.group, backend=backend
            )
        )

    def sizes(self, arrays: tuple[Any, ...]) -> np.ndarray:
        """A fraction of the product of a row's largest number with all weights positive."""
        x, values, scales = (np.asarray(array, np.float32) for array in arrays)
        largest = np.abs(x).reshape(self.rows, -1).max(axis=1)
        weights = np.abs(values).reshape(*self.outputs, -1).sum(axis=-1) * scales
        return largest.reshape(-1, *[1] * weights.ndim) * weights[None]

    @property
    def tolerance(self) -> float:
        """A fraction of ``sizes``: float32 sums; steps of XLA's 16 bits; bfloat16 rows."""
        return 1e-6 + (0.5 / 16256 if self.bits == 16 else 0)


INT8_CASES = (
    Int8Case("one_row", 1, (256,), (384,), 16),
    Int8Case("two_rows_two_matrices", 2, (256,), (2, 512), 8),
    Int8Case("partial_block", 8, (256,), (640,), 16),
    Int8Case("bfloat16", 8, (256,), (256,), 16, dtype="bfloat16"),
    Int8Case("axes_merged", 33, (2, 2, 64), (3, 2, 32), 8),
    Int8Case("odd_width", 33, (640,), (200,), 16),
    Int8Case("many_rows", 512, (512,), (256,), 8),
    Int8Case("groups_of_64", 8, (384,), (256,), 8, 64),
    Int8Case("groups_of_16", 33, (256,), (256,), 8, 16, dtype="bfloat16"),
    Int8Case("groups_of_256", 8, (512,), (256,), 8, 256),
    Int8Case("narrow", 8, (256,), (96,), 8, declined="96 outputs are fewer than 128 lanes"),
    Int8Case("odd_inputs", 2, (7,), (256,), 16, declined="7 inputs are no multiple of 128"),
    Int8Case("apart", 2, (128,), (6, 40), 8, declined="40 outputs are no multiple of 32"),
    Int8Case("groups_of_8", 2, (128,), (128,), 8, 8, declined="activations in groups of 8"),
)


@dataclass(frozen=True)
class GroupedCase:
    """The same for matrices of 4 or 8 ``bits`` with a scale for each ``group`` of inputs."""

    name: str
    rows: int
    num_inputs: int
    outputs: tuple[int, ...]
    bits: int
    group: int
    has_minimums: bool = False
    scales: str = "float16"
    dtype: str = "float32"
    declined: str | None = None

    def draw(self) -> tuple[Any, ...]:
        """Scales of all sizes: the smallest are subnormal in float16, some are 0."""
        random = np.random.default_rng(self.rows + self.group)
        shape = (self.num_inputs // self.group, *self.outputs)
        x = random.standard_normal((self.rows, self.num_inputs))
        x[self.rows // 2] *= self.rows > 2
        scales = random.standard_normal(shape) * 10.0 ** random.integers(-7, 2, shape)
        scales.flat[::17] = 0
        # Where they are all there is, they decide what a product is.
        scales[..., ::3] = np.float32(2.0**-24) * random.integers(
            -1023, 1024, scales[..., ::3].shape
        )
        minimums = random.standard_normal(shape).astype(self.scales)
        shape = (self.num_inputs, *self.outputs)
        if self.bits == 4:
            values = pack_nibbles(random.integers(0, 16, shape), self.group, 0)
        else:
            values = random.integers(-127, 128, shape).astype(np.int8)
        parts = (values, scales.astype(self.scales), minimums if self.has_minimums else None)
        return (
            jnp.asarray(x, self.dtype),
            *(None if part is None else jnp.asarray(part) for part in parts),
        )

    def multiply(self, arrays: tuple[Any, ...], backend: str | None) -> np.ndarray:
        return np.asarray(grouped_matmul(*arrays, backend=backend))

    def sizes(self, arrays: tuple[Any, ...]) -> np.ndarray:
        """Returns the products, were all terms of a sum positive."""
        x, _, scales, minimums = arrays
        largest = {4: 15 if self.has_minimums else 8, 8: 127}[self.bits]
        sums = jnp.abs(x.astype(jnp.float32)).reshape(self.rows, -1, self.group).sum(axis=2)
        weights = jnp.abs(scales.astype(jnp.float32)) * largest
        if minimums is not None:
            weights += jnp.abs(minimums.astype(jnp.float32))
        return np.asarray(jnp.tensordot(sums, weights, 1, precision="highest"))

    @property
    def tolerance(self) -> float:
        """A fraction of ``sizes``: weights have the 8 bits of bfloat16 where the rows do."""
        return 2.0**-9 if self.dtype == "bfloat16" else 1e-6


GROUPED_CASES = (
    GroupedCase("q4_0_one_row", 1, 256, (256,), 4, 32),
    GroupedCase("q4_0", 8, 1024, (640,), 4, 32),
    GroupedCase("q4_0_bfloat16", 8, 256, (256,), 4, 32, dtype="bfloat16"),
    GroupedCase("q4_1", 33, 256, (2, 256), 4, 32, True),
    GroupedCase("groups_of_16", 2, 384, (200,), 4, 16),
    GroupedCase("groups_of_64", 8, 256, (256,), 4, 64, True, "float32"),
    GroupedCase("groups_of_128", 8, 384, (256,), 4, 128),
    GroupedCase("groups_of_128_minimums", 33, 256, (256,), 4, 128, True),
    GroupedCase("many_rows", 512, 256, (256,), 4, 32),
    GroupedCase("q8_0", 8, 256, (2, 256), 8, 32),
    GroupedCase("q8_0_chunks", 8, 1024, (128,), 8, 32),
    GroupedCase("q8_0_minimums", 33, 256, (256,), 8, 16, True),
    GroupedCase("8_bits_bfloat16", 8, 256, (256,), 8, 128, dtype="bfloat16"),
    GroupedCase("narrow", 8, 256, (64,), 4, 32, declined="64 outputs are fewer than 128 lanes"),
    GroupedCase("odd_inputs", 2, 96, (128,), 8, 32, declined="96 inputs are no multiple of 128"),
    GroupedCase("groups_of_8", 2, 128, (128,), 4, 8, declined="groups of 8 are no multiple of 16"),
    GroupedCase("groups_of_256", 2, 256, (128,), 8, 256, declined="do not divide 128"),
)


def check(case: Int8Case | GroupedCase, arrays: tuple[Any, ...], found: np.ndarray) -> None:
    """Against the definition, and that it is float32 of the right shape."""
    wanted = case.multiply(arrays, "reference")
    assert found.dtype == np.float32
    assert found.shape == wanted.shape == (case.rows, *case.outputs)
    errors = np.abs(found - wanted)
    assert (errors <= case.tolerance * case.sizes(arrays) + 1e-30).all(), errors.max()
