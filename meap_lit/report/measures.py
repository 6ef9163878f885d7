"""Numbers of runs that are compared between arms: logged metrics and scores of evaluations."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meap_lit.evaluation.results import num_digits
from meap_lit.evaluation.statistics import Difference, bootstrap, t_interval
from meap_lit.evaluation.task import Result, paired_deltas
from meap_lit.report.arms import Arm
from meap_lit.report.runs import Run

Results = Mapping[Path, Result]
"""Results of one evaluation by the folder of the run."""
ONE_SEED = " (one seed: over items only)"


def in_words(change: Difference, digits: int) -> str:
    """Return a difference for a cell of a table, with a note if it is of one seed."""
    if math.isnan(change.low):
        return f"{change.value:+,.{digits}f} (one seed, no interval)"
    return change.text(digits) + ("" if change.num_seeds > 1 else ONE_SEED)


class Measure(ABC):
    """A number that each run may have."""

    @property
    @abstractmethod
    def digits(self) -> int:
        """Number of decimals in tables."""

    @abstractmethod
    def of_run(self, run: Run) -> float | None:
        """Return the number of a run; None if it has none."""

    @abstractmethod
    def change(self, arm: Arm, baseline: Arm) -> Difference | None:
        """Return arm minus baseline over the seeds of both; None if they have no seed in common."""

    def by_seed(self, arm: Arm) -> dict[str, float]:
        values = {seed: self.of_run(run) for seed, run in arm.runs.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, arm: Arm) -> float:
        """Return the mean over seeds; NaN without one."""
        values = self.by_seed(arm).values()
        return statistics.mean(values) if values else math.nan

    def format(self, value: float) -> str:
        return f"{value:.{self.digits}f}"

    def row(self, arm: Arm) -> list[str]:
        """Return cells of a table: name, mean, values by seed, difference to the baseline."""
        seeds = ", ".join(f"{seed}: {self.format(value)}" for seed, value in self.by_seed(arm).items())
        change = "" if arm.baseline is None else self.change_text(arm, arm.baseline)
        return [arm.name, self.format(self.mean(arm)), seeds, change]

    def text(self, arm: Arm, baseline: Arm | None) -> str:
        """Return one cell: the mean over seeds, and the difference in brackets; empty without a value."""
        if not self.by_seed(arm):
            return ""
        text = self.format(self.mean(arm))
        return text if baseline is None else f"{text} ({self.change_text(arm, baseline)})"

    def change_text(self, arm: Arm, baseline: Arm) -> str:
        change = self.change(arm, baseline)
        if change is None:
            return "no seed in common"
        others = self.by_seed(arm).keys() ^ self.by_seed(baseline).keys()
        return in_words(change, self.digits) + (f", without seed {', '.join(sorted(others))}" if others else "")


@dataclass(frozen=True)
class Logged(Measure):
    """The last value of a logged metric."""

    name: str
    digits: int = 4
    scale: float = 1.0

    def of_run(self, run: Run) -> float | None:
        value = run.final(self.name)
        return None if value is None else self.scale * value

    def change(self, arm: Arm, baseline: Arm) -> Difference | None:
        values, others = self.by_seed(arm), self.by_seed(baseline)
        deltas = [values[seed] - others[seed] for seed in values if seed in others]
        return t_interval(deltas) if deltas else None


@dataclass(frozen=True)
class Score(Measure):
    """The mean score of an evaluation by one metric, over all items or those of some cells.

    Args:
        results: Results of the evaluation, at least one.
        metric: Metric of the task; the headline by default.
        cell: Only items with these values in their cell.
    """

    results: Results
    metric: str | None = None
    cell: Mapping[str, Any] | None = None

    @property
    def result(self) -> Result:
        """Any of the results: all are of the same task."""
        return next(iter(self.results.values()))

    @property
    def digits(self) -> int:
        return num_digits(self.result.unit_of(self.metric or self.result.headline))

    def of_run(self, run: Run) -> float | None:
        wanted = (self.cell or {}).items()
        result = self.results.get(run.path)
        scored = [] if result is None else result.scored(self.metric)
        scores = [score for record, score in scored if wanted <= record["cell"].items()]
        return statistics.mean(scores) if scores else None

    def change(self, arm: Arm, baseline: Arm) -> Difference | None:
        seeds = [
            paired_deltas(self.results[first.path], self.results[second.path], self.metric, self.cell)
            for _, first, second in arm.pairs(baseline)
            if first.path in self.results and second.path in self.results
        ]
        return bootstrap(seeds) if any(seeds) else None
