import math

import pytest

from meap_lit.evaluation.judging.agreement import agreement


@pytest.mark.parametrize(
    ("first", "second", "equal", "kappa"),
    [
        # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: 0.7 equal, 0.5 by chance
        ([True] * 25 + [False] * 25, [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15, 70, 0.4),
        ([True, False], [True, False], 100, 1),
        ([True, False], [False, True], 0, -1),
        ([None, True], [False, True], 100, 1),  # undecided is not free
        ([True, True], [True, False], 50, 0),
    ],
)
def test_agreement(first, second, equal, kappa):
    assert agreement(first, second) == (pytest.approx(equal), pytest.approx(kappa))


def test_agreement_of_judges_without_doubt():
    equal, kappa = agreement([True, True], [True, True])
    assert equal == 100
    assert math.isnan(kappa)
    assert math.isnan(agreement([], [])[0])
