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
    """Mean of second minus first over the items that both answered, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(groups: Sequence[Sequence[float]], num_draws: int = 10_000) -> Difference:
    """Mean of all deltas with the 95% interval of the means that samples of the groups have.

    Groups, such as one question at every position, are drawn with replacement; percentiles, fixed seed.
    """
    sums, sizes = _sums_and_sizes(groups)
    if not len(sums):
        return Difference(math.nan, math.nan, math.nan, 0)
    means = _sample_means(sums, sizes, num_draws, np.random.default_rng(0))
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(sums.sum() / sizes.sum()), float(low), float(high), int(sizes.sum()))


def bootstrap_seeds(seeds: Sequence[Sequence[Sequence[float]]], num_draws: int = 10_000) -> Difference:
    """The same over seeds: these are drawn with replacement, and groups of items within each seed that is drawn.

    Every seed counts alike. Of one seed this is `bootstrap`, whose interval says nothing of other seeds.

    Args:
        seeds: For each seed its groups of deltas, at least one.
        num_draws: Number of samples.
    """
    if len(seeds) == 1:
        return bootstrap(seeds[0], num_draws)
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(seeds), size=(num_draws, len(seeds)))
    totals, values, n = np.zeros(num_draws), [], 0
    for number, groups in enumerate(seeds):
        sums, sizes = _sums_and_sizes(groups)
        draws = np.nonzero(chosen == number)[0]  # a draw comes as often as it has this seed
        np.add.at(totals, draws, _sample_means(sums, sizes, len(draws), generator))
        values.append(sums.sum() / sizes.sum())
        n += int(sizes.sum())
    low, high = np.quantile(totals / len(seeds), [0.025, 0.975])
    return Difference(float(np.mean(values)), float(low), float(high), n)


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
