"""Differences of what runs have one value of each."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from meap_lit.evaluation.statistics import paired_t_test


class SeedDifference(NamedTuple):
    """Mean of paired differences over seeds with its 95% t interval, which is NaN for one seed."""

    value: float
    low: float
    high: float
    num_seeds: int


def seed_difference(deltas: Sequence[float]) -> SeedDifference:
    """The t interval of the mean: all values that a two-sided paired t-test does not refuse at 5%.

    Args:
        deltas: Second minus first of each seed, at least one.
    """
    values = np.asarray(deltas, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return SeedDifference(mean, math.nan, math.nan, n)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    low, high = 0.0, 13 * error  # the quantile is 12.7 for two seeds and smaller for more
    for _ in range(60 if error else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if paired_t_test(list(values - mean + middle)).p > 0.05 else (low, middle)
    half = (low + high) / 2 if error else 0.0
    return SeedDifference(mean, mean - half, mean + half, n)
