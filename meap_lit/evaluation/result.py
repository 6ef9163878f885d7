"""The records of one run of a task on one checkpoint, and what they amount to; the difference of two such runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from meap_lit.evaluation.task import Record, Task

Cell = tuple[Any, ...]


class Mean(NamedTuple):
    """A mean over items, its standard error, and their number."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        """Of 0/1 scores the error is sqrt(p (1 - p) / n); NaN if there is no value."""
        array = np.array(list(values), dtype=np.float64)
        if not len(array):
            return cls(math.nan, math.nan, 0)
        return cls(float(array.mean()), float(array.std() / math.sqrt(len(array))), len(array))


@dataclass(frozen=True)
class Result:
    """What a task found for a checkpoint.

    Args:
        task: The task.
        label: Name of the checkpoint in tables and figures.
        records: One record for each item that was answered, with its `scores`, in the order of the items.
        num_skipped: Items left out since they are longer than the model's context.
        about: What a reader must know of how it came about: checkpoint, recipe, versions, hashes.
    """

    task: Task
    label: str
    records: list[Record]
    num_skipped: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)

    def mean(self, metric: str | None = None) -> Mean:
        """Over all items that have the metric; of the headline if none is named."""
        return Mean.of(value for _, value in self.scored(metric))

    def table(self, metric: str | None = None) -> dict[Cell, Mean]:
        """Mean of each cell; cells in the order of the items, keyed by the values of a record's `cell`."""
        cells: dict[Cell, list[float]] = {}
        for record, value in self.scored(metric):
            cells.setdefault(tuple(record["cell"].values()), []).append(value)
        return {cell: Mean.of(values) for cell, values in cells.items()}

    def along(self, key: str, metric: str | None = None) -> dict[Any, Mean]:
        """Mean by one key of the cells, such as "length", over all others."""
        groups: dict[Any, list[float]] = {}
        for record, value in self.scored(metric):
            groups.setdefault(record["cell"][key], []).append(value)
        return {group: Mean.of(values) for group, values in groups.items()}

    @property
    def cell_keys(self) -> list[str]:
        return list(self.records[0]["cell"]) if self.records else []

    @property
    def metrics(self) -> list[str]:
        """Those metrics of the task that a record has."""
        return [metric for metric in self.task.metrics if self.scored(metric)]

    def scored(self, metric: str | None = None) -> list[tuple[Record, float]]:
        """The records that have a score by the metric, and that score."""
        name = metric or self.task.metrics[0]
        return [(record, record["scores"][name]) for record in self.records if name in record["scores"]]


class Difference(NamedTuple):
    """Mean of second minus first over the items that both answered, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def difference(
    first: Result, second: Result, metric: str | None = None, cell: Mapping[str, Any] | None = None
) -> Difference:
    """Paired bootstrap: groups of items are drawn with replacement, each item with both its scores.

    Args:
        first: The baseline.
        second: What is compared with it.
        metric: One of the scores; the headline if none is named.
        cell: Items with these values in their cell only, such as {"length": 4096}.
    """
    return bootstrap(paired_deltas(first.scored(metric), second.scored(metric), cell))


def paired_deltas(
    first: Sequence[tuple[Record, float]],
    second: Sequence[tuple[Record, float]],
    cell: Mapping[str, Any] | None = None,
) -> list[list[float]]:
    """Second minus first of the items that both have, by groups of items that are drawn together.

    Args:
        first: Records and scores of the baseline.
        second: Those that are compared with it.
        cell: Items with these values in their cell only.
    """
    wanted = (cell or {}).items()
    scores = {record["id"]: score for record, score in first}
    groups: dict[str, list[float]] = {}
    for record, score in second:
        if record["id"] in scores and wanted <= record["cell"].items():
            groups.setdefault(str(record.get("group") or record["id"]), []).append(score - scores[record["id"]])
    return list(groups.values())


def bootstrap(groups: Sequence[Sequence[float]], num_draws: int = 10_000) -> Difference:
    """Mean of all deltas with the 95% interval of the means that samples of the groups have.

    Groups, such as one question at every position, are drawn with replacement; percentiles, fixed seed.
    """
    sums, sizes = _sums_and_sizes(groups)
    if not len(sums):
        return Difference(math.nan, math.nan, math.nan, 0)
    means = _sample_means(sums, sizes, num_draws, np.random.default_rng(0))
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(sums.sum() / sizes.sum()), float(low), float(high), int(sizes.sum()))


def bootstrap_seeds(seeds: Sequence[Sequence[Sequence[float]]], num_draws: int = 10_000) -> Difference:
    """The same over seeds: these are drawn with replacement, and groups of items within each seed that is drawn.

    Every seed counts alike. Of one seed this is `bootstrap`, whose interval says nothing of other seeds.

    Args:
        seeds: For each seed its groups of deltas, at least one.
        num_draws: Number of samples.
    """
    if len(seeds) == 1:
        return bootstrap(seeds[0], num_draws)
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(seeds), size=(num_draws, len(seeds)))
    totals, values, n = np.zeros(num_draws), [], 0
    for number, groups in enumerate(seeds):
        sums, sizes = _sums_and_sizes(groups)
        draws = np.nonzero(chosen == number)[0]  # a draw comes as often as it has this seed
        np.add.at(totals, draws, _sample_means(sums, sizes, len(draws), generator))
        values.append(sums.sum() / sizes.sum())
        n += int(sizes.sum())
    low, high = np.quantile(totals / len(seeds), [0.025, 0.975])
    return Difference(float(np.mean(values)), float(low), float(high), n)


def _sums_and_sizes(groups: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([[sum(deltas), len(deltas)] for deltas in groups], dtype=np.float64).reshape(-1, 2).T


def _sample_means(sums: np.ndarray, sizes: np.ndarray, num_draws: int, generator: np.random.Generator) -> np.ndarray:
    """Means of samples of as many groups as there are, drawn with replacement, [num_draws]."""
    means = np.empty(num_draws)
    at_once = max(1, 1_000_000 // len(sums))  # samples; more would take more memory than time
    for start in range(0, num_draws, at_once):
        drawn = generator.integers(len(sums), size=(len(means[start : start + at_once]), len(sums)))
        means[start : start + at_once] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means
