"""Means with standard errors, paired bootstrap, Student's t."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
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


Groups = Mapping[str, Sequence[float]]
"""Differences by the name of the group that is drawn together, such as one question at every position."""


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

    @classmethod
    def of_seeds(cls, values: Sequence[float]) -> "Mean":
        """Return the mean of one value for each seed; the error estimates the deviation of all seeds from these few."""
        n = len(values)
        error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(statistics.mean(values), error, n)


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
        if math.isnan(self.low):
            return f"{self.value:+,.{digits}f} (no interval)"
        return f"{self.value:+,.{digits}f} [{self.low:+,.{digits}f}, {self.high:+,.{digits}f}]"


def bootstrap(seeds: Sequence[Groups], num_draws: int = 10_000) -> Difference:
    """Return the mean of paired differences with its 95% percentile interval under resampling.

    A draw takes seeds with replacement, and groups with replacement. The same groups count for all of its seeds: a
    question that favors one side for every seed is one observation, not one for each seed. Every seed has the same
    weight. With a single seed the interval covers its items only, not other seeds; a single group of a single seed has
    none (NaN). The random state is fixed.

    Args:
        seeds: Groups of differences for each seed. Seeds without groups are ignored.
        num_draws: Number of samples.
    """
    seeds = [groups for groups in seeds if groups]
    if not seeds:
        return Difference(math.nan, math.nan, math.nan, 0)
    names = list(dict.fromkeys(name for groups in seeds for name in groups))
    sums = np.array([[sum(groups.get(name, ())) for name in names] for groups in seeds], dtype=np.float64)  # [S, G]
    sizes = np.array([[len(groups.get(name, ())) for name in names] for groups in seeds], dtype=np.float64)
    generator = np.random.default_rng(0)
    num_seeds = len(seeds)
    value = (sums.sum(axis=1) / sizes.sum(axis=1)).mean()
    if num_seeds == len(names) == 1:
        return Difference(float(value), math.nan, math.nan, int(sizes.sum()))
    chosen = (
        generator.integers(num_seeds, size=(num_draws, num_seeds)) if num_seeds > 1 else np.zeros((num_draws, 1), int)
    )
    means = np.empty((num_draws, num_seeds))
    at_once = max(1, 1_000_000 // len(names))  # bounds the memory
    for start in range(0, num_draws, at_once):
        some = means[start : start + at_once]
        drawn = generator.integers(len(names), size=(len(some), len(names)))
        with np.errstate(invalid="ignore"):  # a seed may have none of the groups of a draw
            some[:] = (sums[:, drawn].sum(2) / sizes[:, drawn].sum(2)).T
    low, high = np.nanquantile(np.take_along_axis(means, chosen, axis=1).mean(axis=1), [0.025, 0.975])
    return Difference(float(value), float(low), float(high), int(sizes.sum()), num_seeds)
