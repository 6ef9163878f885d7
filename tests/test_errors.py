"""Ranges of numbers, as messages name them."""

import math

import pytest

from meap_lit.errors import UserError, check_range


@pytest.mark.parametrize(("value", "bounds"), [(1, "[1, inf)"), (0.5, "(0, 1]"), (1, "(0, 1]"), (None, "(0, 1)")])
def test_a_number_in_the_interval_passes(value, bounds):
    check_range("key", value, bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, "[1, inf)", "key must be at least 1, got 0"),
        (-1.5, "(0, inf)", "key must be above 0, got -1.5"),
        (0.0, "(0, inf)", "key must be above 0, got 0"),
        (1.0, "[0, 1)", "key must be in [0, 1), got 1"),
        (math.nan, "[0, 1)", "key must be in [0, 1), got nan"),
        (math.inf, "[1, inf)", "key must be at least 1 and finite, got inf"),
        (2**70, "[0, 4]", f"key must be in [0, 4], got {2**70}"),
    ],
)
def test_a_number_outside_is_named(value, bounds, message):
    with pytest.raises(UserError) as error:
        check_range("key", value, bounds)
    assert str(error.value) == message
