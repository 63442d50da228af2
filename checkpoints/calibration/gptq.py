"""GPTQ (Frantar, Ashkboos, Hoefler, Alistarh 2022): the error of each rounding is made up for by
what has not been rounded yet, for inputs as they come.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.weights import GroupedFormat
from jaxinfer.weights.grouped import GroupedWeight
from jaxinfer.weights.rounding import nearest, numbers, steps_of_groups

# Of the mean of the moments' diagonal, added to it; more where the sum cannot be factored.
_DAMPING = (0.01, 0.1, 1.0)


def gptq(weight: GroupedWeight, matrix: jax.Array, rows: jax.Array) -> Mapping[str, jax.Array]:
    """The arrays of ``matrix`` [I..., O...] for products with rows like ``rows`` [T, I].

    What stays small is |rows (matrix - rounded)|^2 instead of |matrix - rounded|^2.
    Raises ``ValueError`` for rows that are not finite.
    """
    values = matrix.reshape(weight.num_inputs, -1)
    factor = _factor(rows)
    groups, scales, minimums = _round(values, factor, weight.form)
    outputs = weight.shape[weight.inputs[-1] + 1 :]

    def shaped(array: jax.Array) -> jax.Array:
        return array.reshape(*array.shape[:2], *outputs)

    return weight.arrays(
        shaped(groups), shaped(scales), None if minimums is None else shaped(minimums)
    )


def _factor(rows: jax.Array) -> jax.Array:
    """[T, I] -> upper U [I, I] with U^T U the inverse of the rows' second moments, damped."""
    for damping in _DAMPING:
        factor = _damped_factor(rows, damping)
        if jnp.isfinite(factor).all():
            return factor
    raise ValueError(
        "the inputs of a matrix have no finite second moments: nothing to calibrate by"
    )


@functools.partial(jax.jit, static_argnums=1)
def _damped_factor(rows: jax.Array, damping: float) -> jax.Array:
    moments = jnp.matmul(rows.T, rows, precision="highest") / rows.shape[0]
    mean = jnp.mean(jnp.diagonal(moments))
    mean = jnp.where(mean > 0, mean, 1)
    identity = jnp.eye(rows.shape[1], dtype=moments.dtype)
    moments = moments / mean + damping * identity
    # With H = V V^T for an upper V, the inverse of H is U^T U for U = V^-1: no inverse is factored.
    lower = jnp.linalg.cholesky(moments[::-1, ::-1])
    upper = lower[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, identity, lower=False)


@functools.partial(jax.jit, static_argnums=2)
def _round(
    values: jax.Array, factor: jax.Array, form: GroupedFormat
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """[I, O] -> integers [I/G, G, O], scales and minimums [I/G, 1, O]."""
    group = form.group
    num_inputs, num_outputs = values.shape
    num_groups = num_inputs // group

    def one_group(values: jax.Array, number: jax.Array) -> tuple[jax.Array, Any]:
        first = number * group
        members = jax.lax.dynamic_slice_in_dim(values, first, group)
        scales, minimums = steps_of_groups(members, form, 0)
        reach = jax.lax.dynamic_slice_in_dim(factor, first, group)  # [G, I]
        within = jax.lax.dynamic_slice_in_dim(reach, first, group, axis=1)  # [G, G]

        def one_input(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            members, integers, errors = carry
            row = jax.lax.dynamic_slice_in_dim(members, i, 1)
            rounded = nearest(row, scales, minimums, form)
            error = (row - numbers(rounded, scales, minimums)) / within[i, i]
            # Rows of a factor are zero before their diagonal: what is rounded stays.
            members = members - within[i][:, None] * error
            integers = jax.lax.dynamic_update_slice_in_dim(integers, rounded, i, 0)
            return members, integers, jax.lax.dynamic_update_slice_in_dim(errors, error, i, 0)

        none = jnp.zeros((group, num_outputs))
        start = (members, none.astype(jnp.int8), none)
        _, integers, errors = jax.lax.fori_loop(0, group, one_input, start)
        return values - reach.T @ errors, (integers, scales, minimums)

    _, rounded = jax.lax.scan(one_group, values, jnp.arange(num_groups))
    return rounded
