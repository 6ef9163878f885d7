"""Schedules of the mask ratio over a run."""

import math
from collections.abc import Callable

import pytest

from meap_lit.errors import UserError
from meap_lit.masking.schedules import Constant, Cosine, Linear, MaskSchedule, Piecewise, WarmupHold


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.15), {-5: 0.15, 0: 0.15, 99: 0.15, 100: 0.15, 1_000: 0.15}),
        (Constant(0), {0: 0, 100: 0}),
        (Linear(0.05, 0.25), {-5: 0.05, 0: 0.05, 25: 0.10, 50: 0.15, 100: 0.25, 101: 0.25}),
        (Linear(0.2, 0.0, steps=10), {0: 0.2, 5: 0.1, 10: 0.0, 50: 0.0}),
        (Linear(0.1, 0.2, steps=0), {-1: 0.1, 0: 0.2, 1: 0.2}),
        (Cosine(0.1, 0.2), {-5: 0.1, 0: 0.1, 25: 0.1 + 0.05 * (1 - math.sqrt(0.5)), 50: 0.15, 100: 0.2, 101: 0.2}),
        (Cosine(0.1, 0.2, steps=0), {-1: 0.1, 0: 0.2}),
        (Cosine(0.0, 0.2, steps=4), {0: 0.0, 2: 0.1, 4: 0.2, 100: 0.2}),
        (WarmupHold(0.2, warmup_steps=10, hold_off=5), {0: 0, 5: 0, 6: 0.02, 10: 0.1, 15: 0.2, 99: 0.2}),
        (WarmupHold(0.2, warmup_steps=0, hold_off=5), {4: 0, 5: 0.2}),
        (WarmupHold(0.2, warmup_steps=0), {-1: 0, 0: 0.2}),
        (Piecewise([0.0, 0.1, 0.15], [10, 20]), {-5: 0.0, 0: 0.0, 9: 0.0, 10: 0.1, 19: 0.1, 20: 0.15, 99: 0.15}),
        (Piecewise([0.1], []), {0: 0.1, 99: 0.1}),
    ],
)
def test_schedule_values(schedule: MaskSchedule, expected: dict[int, float]) -> None:
    assert {step: schedule(step, max_steps=100) for step in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", [Linear(0.1, 0.3), Cosine(0.1, 0.3)])
def test_ramp_over_the_whole_run_needs_its_length(schedule: MaskSchedule) -> None:
    """Lightning writes -1 for a run without a number of steps."""
    with pytest.raises(UserError, match=r"needs trainer\.max_steps, got -1; or set model\.mask_ratio\.steps$"):
        schedule(0, max_steps=-1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Constant(-0.1), r"^model\.mask_ratio must be in \[0, 1\), got -0\.1$"),
        (lambda: Constant(1), r"^model\.mask_ratio must be in \[0, 1\), got 1; write 0\.01 for 1%$"),
        (
            lambda: Linear(start=1.5),
            r"^model\.mask_ratio\.start must be in \[0, 1\), got 1\.5; write 0\.015 for 1\.5%$",
        ),
        (lambda: Linear(end=20), r"^model\.mask_ratio\.end .* write 0\.2 for 20%$"),
        (lambda: Linear(steps=-1), r"^model\.mask_ratio\.steps must be at least 0, got -1$"),
        (lambda: Cosine(start=-1), r"^model\.mask_ratio\.start must be in \[0, 1\), got -1$"),
        (lambda: Cosine(end=200), r"^model\.mask_ratio\.end must be in \[0, 1\), got 200$"),
        (lambda: Cosine(steps=-1), r"^model\.mask_ratio\.steps must be at least 0, got -1$"),
        (lambda: WarmupHold(mask_ratio=15), r"^model\.mask_ratio\.mask_ratio .* write 0\.15 for 15%$"),
        (lambda: WarmupHold(warmup_steps=-2), r"^model\.mask_ratio\.warmup_steps must be at least 0, got -2$"),
        (lambda: WarmupHold(hold_off=-2), r"^model\.mask_ratio\.hold_off must be at least 0, got -2$"),
        (lambda: Piecewise([0.1, 10], [5]), r"^model\.mask_ratio\.mask_ratios .* write 0\.1 for 10%$"),
        (
            lambda: Piecewise([0.1], [5]),
            r"boundaries must rise and be one fewer than .*; got boundaries \[5\] for mask_ratios \[0\.1\]$",
        ),
        (lambda: Piecewise([], []), r"boundaries must rise"),
        (lambda: Piecewise([0.1, 0.2, 0.3], [5, 5]), r"boundaries must rise"),
        (lambda: Piecewise([0.1, 0.2, 0.3], [6, 5]), r"boundaries must rise"),
    ],
)
def test_wrong_schedules_are_refused_in_one_line(build: Callable[[], MaskSchedule], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
