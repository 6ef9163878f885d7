import numpy as np
import pytest

from meap_lit.evaluation.statistics import bootstrap, bootstrap_seeds
from meap_lit.evaluation.task import paired_deltas


def test_deltas_of_items_that_both_have_by_group():
    first = [({"id": name, "group": group, "cell": {"x": x}}, 1.0) for name, group, x in (("a", "g", 0), ("b", "g", 1))]
    second = [({"id": name, "group": "g", "cell": {"x": x}}, 3.0) for name, x in (("a", 0), ("b", 1), ("c", 0))]
    assert paired_deltas(first, second) == [[2.0, 2.0]]
    assert paired_deltas(first, second, {"x": 1}) == [[2.0]]


def test_one_seed_is_the_bootstrap_of_its_items():
    groups = [[1.0, 0.0], [2.0], [5.0]]
    assert bootstrap_seeds([groups]) == bootstrap(groups)


def test_seeds_count_alike_whatever_their_items():
    change = bootstrap_seeds([[[2.0]] * 50, [[4.0]]])
    assert (change.value, change.n) == (3.0, 51)
    # two of two seeds are the same one in half of the draws, and a quarter of them each
    assert (change.low, change.high) == (2.0, 4.0)


def test_interval_has_the_spread_of_seeds_and_of_items():
    generator = np.random.default_rng(1)
    items = [generator.normal(shift, 3.0, size=200) for shift in np.linspace(-2, 2, 8)]
    change = bootstrap_seeds([[[delta] for delta in seed] for seed in items])
    means = np.array([seed.mean() for seed in items])
    variance = means.var() / 8 + sum(seed.var() / 200 for seed in items) / 64
    assert change.value == pytest.approx(means.mean())
    assert (change.high - change.low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=0.05)
