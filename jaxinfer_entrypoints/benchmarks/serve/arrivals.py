"""Arrival times of requests, and their random prompts. Imports no JAX."""

import math

import numpy as np


def arrival_times(
    num_requests: int, rate: float, burstiness: float, random: np.random.Generator
) -> list[float]:
    """Seconds after the start at which each request arrives; all 0 for an infinite rate.

    The gaps are of a gamma distribution with shape ``burstiness`` and mean 1 / ``rate``: 1 is a
    Poisson process, less is burstier, more is more even. As in vLLM they are then scaled so that
    the last one arrives at ``num_requests`` / ``rate``: the rate is what was asked for.
    """
    if math.isinf(rate):
        return [0.0] * num_requests
    times = np.cumsum(random.gamma(burstiness, 1 / (rate * burstiness), num_requests))
    if times[-1] == 0:  # extremely bursty: every gap is too small for a float
        return [0.0] * num_requests
    return (times * (num_requests / rate / times[-1])).tolist()


def length_range(length: int, range_ratio: float) -> tuple[int, int]:
    """The least and the greatest length: ``length`` less and more by the ratio, at least 1."""
    return max(1, math.floor(length * (1 - range_ratio))), math.ceil(length * (1 + range_ratio))


def random_lengths(
    num_requests: int, length: int, range_ratio: float, random: np.random.Generator
) -> list[int]:
    """Uniform between both ends of ``length_range``."""
    low, high = length_range(length, range_ratio)
    return random.integers(low, high, num_requests, endpoint=True).tolist()


def random_prompts(
    lengths: list[int], vocab_size: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Random token ids, int32: timing does not depend on which."""
    return [random.integers(0, vocab_size, length, dtype=np.int32) for length in lengths]
