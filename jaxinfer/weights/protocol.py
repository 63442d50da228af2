"""Formats of matrices: all that models, checkpoints and devices ask of one.

A format is a file that has one class of each kind, and an entry in ``jaxinfer.weights.formats``.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxinfer.weights.integers import Integers

Array = np.ndarray | jax.Array


@dataclass(frozen=True)
class Format:
    """The numbers that a format's matrices are made of; converted folders keep its fields.

    Its class is known by its name there. Raises ``ValueError`` for a field that cannot be.
    """

    @property
    def multiplies_integers(self) -> bool:
        """Tells if a product is of integers, which no order of summation changes."""
        return False

    @abc.abstractmethod
    def weight(
        self, matrix: jax.Array, axes: tuple[str | None, ...], inputs: tuple[int, ...]
    ) -> "QuantizedWeight":
        """Returns a matrix, whose ``inputs`` a product sums over, in this format.

        ``axes`` are logical. ``ValueError`` for a shape that cannot be in it.
        """

    def check_device(self, name: str, device: Any) -> None:
        """Raises ``ValueError`` where ``device`` cannot multiply it; all can if nothing is said."""


class QuantizedWeight(nnx.Module):
    """Parameters in place of a matrix of ``shape``, whose ``inputs`` a product sums over."""

    form: Any
    shape: tuple[int, ...]
    inputs: tuple[int, ...]

    def check_division(self, num_devices: int) -> None:
        """Raises ``ValueError`` where inputs cannot be divided over devices; here they can."""

    @abc.abstractmethod
    def quantize(self, matrix: Array) -> Mapping[str, Any]:
        """Returns the arrays of a matrix by the parameters' names, numpy's for numpy's."""

    @abc.abstractmethod
    def dequantize(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the matrix that ``arrays`` stand for, in float32 and its own axes."""

    @abc.abstractmethod
    def from_stored(self, parts: Integers) -> Mapping[str, np.ndarray]:
        """Returns the arrays of a matrix that a file stores as integers, of the same numbers.

        ``parts`` have the matrix's axes.
        """

    @abc.abstractmethod
    def integers(self, arrays: Mapping[str, np.ndarray]) -> Integers:
        """Returns what ``from_stored`` made ``arrays`` of."""

    @property
    @abc.abstractmethod
    def matrix(self) -> "QuantizedMatrix":
        """Returns the arrays, to multiply with."""


class QuantizedMatrix(abc.ABC):
    """The arrays of a weight inside a program; a dataclass that JAX knows."""

    @abc.abstractmethod
    def product(self, inputs: jax.Array) -> jax.Array:
        """[T, I...] -> [T, O...] float32."""

    @abc.abstractmethod
    def grouped_product(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """[N, I] -> [N, O] float32 with one of the matrices [X, I, O] for each group of rows."""

    @abc.abstractmethod
    def outputs(self, indices: jax.Array) -> jax.Array:
        """[N] -> [N, I] float32: what some outputs of a matrix of two axes are made of."""


def check_field(name: str, value: object, known: tuple[object, ...]) -> None:
    """Raises ``ValueError`` naming the field of a format, its value and the ``known`` ones."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r:.40}")
