import math

import pytest

from meap_lit.report.measures import over_seeds


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
    change = over_seeds(deltas)
    mean = sum(deltas) / len(deltas)
    assert (change.value, change.num_seeds) == (mean, len(deltas))
    assert change.low == pytest.approx(mean - half, abs=1e-4)
    assert change.high == pytest.approx(mean + half, abs=1e-4)


def test_one_seed_has_no_interval():
    change = over_seeds([2.0])
    assert change.value == 2
    assert math.isnan(change.low)
    assert over_seeds([]) is None
