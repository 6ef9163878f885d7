"""Means with standard errors, paired bootstrap, Student's t."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from meap_lit.errors import UserError


def student() -> Any:
    """Return `scipy.stats`.

    Raises:
        UserError: If scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError("Student's t needs scipy: pip install 'meap-lit[statistics]'") from error
    return stats


def paired_t_test(deltas: Sequence[float]) -> tuple[float, float]:
    """Test whether the mean of paired differences is 0; return t and the two-sided p, NaN for fewer than two."""
    values = np.asarray(deltas, dtype=np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    if not np.ptp(values):
        return (math.copysign(math.inf, values[0]), 0.0) if values[0] else (0.0, 1.0)
    test = student().ttest_1samp(values, 0.0)
    return float(test.statistic), float(test.pvalue)


def t_interval(deltas: Sequence[float]) -> "Difference":
    """Return the mean of paired differences with the 95% interval of Student's t; NaN bounds for a single one.

    Args:
        deltas: Second minus first of each pair, such as a pair of runs with the same seed; at least one.
    """
    values = np.asarray(deltas, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Difference(mean, math.nan, math.nan, n, n)
    half = float(student().t.ppf(0.975, n - 1) * values.std(ddof=1)) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n, n)


Groups = Sequence[Sequence[float]]
"""Differences by groups that are drawn together, such as one question at every position."""


class Mean(NamedTuple):
    """Mean over n items with its standard error."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        """Return the mean of values, NaN if there is none. For 0/1 scores the error is sqrt(p (1 - p) / n)."""
        array = np.array(list(values), dtype=np.float64)
        if not len(array):
            return cls(math.nan, math.nan, 0)
        return cls(float(array.mean()), float(array.std() / math.sqrt(len(array))), len(array))


class Difference(NamedTuple):
    """Mean of n paired differences of `num_seeds` pairs of runs, second minus first, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int
    num_seeds: int = 1

    def record(self) -> dict[str, float]:
        """Return the values for result.json, which compares one pair of checkpoints."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def text(self, digits: int) -> str:
        """Return mean and interval for a cell of a table."""
        return f"{self.value:+,.{digits}f} [{self.low:+,.{digits}f}, {self.high:+,.{digits}f}]"


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
    return Difference(float(value), float(low), float(high), sum(int(sizes.sum()) for _, sizes in tables), num_seeds)


def _sums_and_sizes(groups: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([[sum(deltas), len(deltas)] for deltas in groups], dtype=np.float64).reshape(-1, 2).T


def _sample_means(sums: np.ndarray, sizes: np.ndarray, num_draws: int, generator: np.random.Generator) -> np.ndarray:
    """Return the means of samples of len(sums) groups, drawn with replacement, [num_draws]."""
    means = np.empty(num_draws)
    at_once = max(1, 1_000_000 // len(sums))  # bounds the memory
    for start in range(0, num_draws, at_once):
        drawn = generator.integers(len(sums), size=(len(means[start : start + at_once]), len(sums)))
        means[start : start + at_once] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means
