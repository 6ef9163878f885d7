"""Schedules of the mask ratio: which share of the tokens is masked at each step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from meap_lit.errors import UserError, check_range
from meap_lit.masking.positions import check_ratio


class MaskSchedule(ABC):
    """The mask ratio P as a function of the optimizer step; a recipe gives it as `model.mask_ratio`."""

    @abstractmethod
    def __call__(self, step: int, max_steps: int) -> float:
        """Return P at optimizer step `step`, counted from 0, of a run of `max_steps` steps."""


@dataclass(frozen=True)
class Constant(MaskSchedule):
    """The same P at every step, as in the paper; `model.mask_ratio: 0.15` is short for it.

    Args:
        mask_ratio: Share of the input tokens that is masked; 0 is plain next-token prediction.
    """

    mask_ratio: float = 0.15

    def __post_init__(self) -> None:
        check_ratio("model.mask_ratio", self.mask_ratio)

    def __call__(self, step: int, max_steps: int) -> float:
        return self.mask_ratio


@dataclass(frozen=True)
class Ramp(MaskSchedule):
    """P moves from `start` to `end`, then stays there.

    Args:
        start: P at step 0.
        end: P from `steps` on.
        steps: Length of the ramp in optimizer steps; the whole run if not given.
    """

    start: float = 0.0
    end: float = 0.15
    steps: int | None = None

    def __post_init__(self) -> None:
        check_ratio("model.mask_ratio.start", self.start)
        check_ratio("model.mask_ratio.end", self.end)
        check_range("model.mask_ratio.steps", self.steps, "[0, inf)")

    def __call__(self, step: int, max_steps: int) -> float:
        return self.start + (self.end - self.start) * self.shape(_progress(step, self.steps, max_steps))

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Return the share of the way from `start` to `end` after a share `progress` of the steps; both in [0, 1]."""


class Linear(Ramp):
    """P moves from `start` to `end` in a straight line."""

    def shape(self, progress: float) -> float:
        return progress


class Cosine(Ramp):
    """P moves from `start` to `end` along half a cosine wave."""

    def shape(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class WarmupHold(MaskSchedule):
    """No masking for `hold_off` steps, then a straight ramp to `mask_ratio` over `warmup_steps`; P stays there.

    Args:
        mask_ratio: P once warmed up.
        warmup_steps: Length of the ramp in optimizer steps.
        hold_off: Steps of plain next-token prediction before the ramp.
    """

    mask_ratio: float = 0.15
    warmup_steps: int = 1000
    hold_off: int = 0

    def __post_init__(self) -> None:
        check_ratio("model.mask_ratio.mask_ratio", self.mask_ratio)
        check_range("model.mask_ratio.warmup_steps", self.warmup_steps, "[0, inf)")
        check_range("model.mask_ratio.hold_off", self.hold_off, "[0, inf)")

    def __call__(self, step: int, max_steps: int) -> float:
        return self.mask_ratio * _progress(step - self.hold_off, self.warmup_steps, max_steps)


@dataclass(frozen=True)
class Piecewise(MaskSchedule):
    """P jumps at given steps.

    Args:
        mask_ratios: One P for each piece.
        boundaries: Step at which each piece but the first begins, rising; one fewer than `mask_ratios`.
    """

    mask_ratios: list[float]
    boundaries: list[int]

    def __post_init__(self) -> None:
        for mask_ratio in self.mask_ratios:
            check_ratio("model.mask_ratio.mask_ratios", mask_ratio)
        if len(self.mask_ratios) != len(self.boundaries) + 1 or self.boundaries != sorted(set(self.boundaries)):
            raise UserError(
                f"model.mask_ratio.boundaries must rise and be one fewer than model.mask_ratio.mask_ratios; "
                f"got boundaries {self.boundaries} for mask_ratios {self.mask_ratios}"
            )

    def __call__(self, step: int, max_steps: int) -> float:
        return self.mask_ratios[sum(step >= boundary for boundary in self.boundaries)]


def _progress(step: int, steps: int | None, max_steps: int) -> float:
    """Return the share of a ramp that is over at `step`; a ramp of no steps is over at step 0."""
    if steps is None and not 0 <= max_steps < math.inf:
        raise UserError(
            f"a mask schedule over the whole run needs trainer.max_steps, got {max_steps}; "
            f"or set model.mask_ratio.steps"
        )
    length = max_steps if steps is None else steps
    return min(1.0, max(0.0, step / length)) if length > 0 else float(step >= 0)
