"""Differences of what runs have one value of each."""

from collections.abc import Sequence
from typing import NamedTuple

from meap_lit.evaluation.statistics import t_interval


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
    return SeedDifference(*t_interval(deltas))
