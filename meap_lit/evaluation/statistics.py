"""Student's t-test for paired samples."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_NUM_TERMS = 1000
"""Of the continued fraction; it needs some multiple of the square root of the number of samples."""


class TTest(NamedTuple):
    """The t statistic and the two-sided p-value."""

    t: float
    p: float


def paired_t_test(deltas: Sequence[float]) -> TTest:
    """Whether the mean of paired differences is other than 0; NaN for fewer than two.

    Args:
        deltas: Second minus first of each pair.
    """
    values = np.asarray(deltas, dtype=np.float64)
    n = len(values)
    if n < 2:
        return TTest(math.nan, math.nan)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return TTest(math.copysign(math.inf, mean), 0.0) if mean else TTest(0.0, 1.0)
    t = mean / error
    # of the t distribution with n - 1 degrees of freedom: NIST Digital Library of Mathematical Functions, 8.17
    return TTest(t, _incomplete_beta((n - 1) / (n - 1 + t * t), (n - 1) / 2, 0.5))


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):  # the fraction converges slowly here, and fast on the other side
        return 1 - _incomplete_beta(1 - x, b, a)
    fraction = 1.0
    for m in reversed(range(1, _NUM_TERMS)):
        fraction = 1 - (a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)) / fraction
        fraction = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / fraction
    fraction = 1 - (a + b) * x / (a + 1) / fraction
    beta = math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    return x**a * (1 - x) ** b / (a * beta * fraction)


Groups = Sequence[Sequence[float]]
"""Differences by groups that are drawn together, such as one question at every position."""


class Mean(NamedTuple):
    """A mean over items, its standard error, and their number."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        """Of 0/1 scores the error is sqrt(p (1 - p) / n); NaN if there is no value."""
        array = np.array(list(values), dtype=np.float64)
        if not len(array):
            return cls(math.nan, math.nan, 0)
        return cls(float(array.mean()), float(array.std() / math.sqrt(len(array))), len(array))


class Difference(NamedTuple):
    """Mean of n paired differences, second minus first, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(seeds: Sequence[Groups], num_draws: int = 10_000) -> Difference:
    """Return the mean of paired differences with its 95% percentile interval under resampling.

    Seeds are drawn with replacement, and groups within each seed that is drawn. Every seed has the same weight. With
    a single seed the interval covers its items only, not other seeds. The random state is fixed.

    Args:
        seeds: Groups of differences for each seed. Seeds without groups are ignored.
        num_draws: Number of samples.
    """
    tables = [_sums_and_sizes(groups) for groups in seeds if len(groups)]
    if not tables:
        return Difference(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(0)
    num_seeds = len(tables)
    chosen = generator.integers(num_seeds, size=(num_draws, num_seeds)) if num_seeds > 1 else np.zeros((num_draws, 1))
    totals = np.zeros(num_draws)
    for number, (sums, sizes) in enumerate(tables):
        draws = np.nonzero(chosen == number)[0]  # a draw appears once for each time that it has this seed
        np.add.at(totals, draws, _sample_means(sums, sizes, len(draws), generator))
    low, high = np.quantile(totals / num_seeds, [0.025, 0.975])
    value = np.mean([sums.sum() / sizes.sum() for sums, sizes in tables])
    return Difference(float(value), float(low), float(high), sum(int(sizes.sum()) for _, sizes in tables))


def t_interval(deltas: Sequence[float]) -> Difference:
    """Return the mean of paired differences with the 95% interval of Student's t; NaN bounds for a single one.

    Args:
        deltas: Second minus first of each pair, such as a pair of runs with the same seed; at least one.
    """
    values = np.asarray(deltas, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Difference(mean, math.nan, math.nan, n)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    low, high = 0.0, 13 * error  # the quantile is 12.7 for two seeds and smaller for more
    for _ in range(60 if error else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if paired_t_test(list(values - mean + middle)).p > 0.05 else (low, middle)
    half = (low + high) / 2 if error else 0.0
    return Difference(mean, mean - half, mean + half, n)


def _sums_and_sizes(groups: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([[sum(deltas), len(deltas)] for deltas in groups], dtype=np.float64).reshape(-1, 2).T


def _sample_means(sums: np.ndarray, sizes: np.ndarray, num_draws: int, generator: np.random.Generator) -> np.ndarray:
    """Means of samples of as many groups as there are, drawn with replacement, [num_draws]."""
    means = np.empty(num_draws)
    at_once = max(1, 1_000_000 // len(sums))  # samples; more would take more memory than time
    for start in range(0, num_draws, at_once):
        drawn = generator.integers(len(sums), size=(len(means[start : start + at_once]), len(sums)))
        means[start : start + at_once] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means
