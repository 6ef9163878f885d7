"""Student's t-test for paired samples."""

import math
from collections.abc import Sequence
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
