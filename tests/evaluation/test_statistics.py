import math
import sys

import numpy as np
import pytest

from meap_lit.errors import UserError
from meap_lit.evaluation.statistics import paired_t_test, t_interval


def sample(t, n):
    """`n` numbers whose t statistic is `t`."""
    values = np.random.default_rng(n).normal(size=n)
    return (values - values.mean()) / values.std(ddof=1) / math.sqrt(n) + t / n


@pytest.mark.parametrize(
    ("t", "n", "p"),
    [  # critical values as printed in tables of the t distribution
        (12.706, 2, 0.05),
        (2.228, 11, 0.05),
        (3.169, 11, 0.01),
        (2.086, 21, 0.05),
        (1.984, 101, 0.05),
        (2.626, 101, 0.01),
        (3.390, 101, 0.001),
        (1.960, 100_001, 0.05),
    ],
)
def test_the_p_value_is_that_of_tables(t, n, p):
    found_t, found_p = paired_t_test(sample(t, n))
    assert found_t == pytest.approx(t, rel=1e-6)
    assert found_p == pytest.approx(p, rel=2e-3)
    assert paired_t_test(sample(-t, n)) == pytest.approx((-t, found_p), rel=1e-6)


@pytest.mark.parametrize("t", [0.01, 1.0, 30.0, 1e5])
def test_small_p_values_keep_their_digits(t):
    # for one and two degrees of freedom the distribution has a closed form
    assert paired_t_test(sample(t, 2))[1] == pytest.approx(2 / math.pi * math.atan(1 / t), rel=1e-6)
    root = math.sqrt(2 + t * t)
    assert paired_t_test(sample(t, 3))[1] == pytest.approx(2 / (root * (root + t)), rel=1e-6)


def test_differences_without_spread():
    assert paired_t_test([0.0, 0.0, 0.0]) == (0.0, 1.0)
    assert paired_t_test([-2.0, -2.0, -2.0]) == (-math.inf, 0.0)
    assert all(map(math.isnan, (*paired_t_test([1.0]), *paired_t_test([]))))


def test_a_sample_worked_out_by_hand():
    # mean 2, standard deviation 1, standard error 1 / sqrt(3); two degrees of freedom: p = 1 - t / sqrt(2 + t^2)
    t, p = paired_t_test([1.0, 2.0, 3.0])
    assert t == pytest.approx(2 * math.sqrt(3))
    assert p == pytest.approx(1 - math.sqrt(12 / 14))


@pytest.mark.parametrize(
    ("deltas", "half"),
    [
        # quantiles of Student's t at 97.5% from tables: 12.7062, 4.30265 and 2.77645 for 1, 2 and 4 degrees of freedom
        ([1.0, 3.0], 12.7062),
        ([1.0, 2.0, 3.0], 4.30265 / math.sqrt(3)),
        ([-2.0, -1.0, 0.0, 1.0, 2.0], 2.77645 * math.sqrt(2.5 / 5)),
        ([4.0, 4.0], 0.0),
    ],
)
def test_interval_is_that_of_the_t_distribution(deltas, half):
    change = t_interval(deltas)
    mean = sum(deltas) / len(deltas)
    assert (change.value, change.n, change.num_seeds) == (mean, len(deltas), len(deltas))
    assert change.low == pytest.approx(mean - half, abs=1e-4)
    assert change.high == pytest.approx(mean + half, abs=1e-4)


def test_a_single_difference_has_no_interval():
    change = t_interval([2.0])
    assert change.value == 2
    assert math.isnan(change.low)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"needs scipy: pip install 'meap-lit\[statistics\]'"):
        t_interval([1.0, 2.0])
