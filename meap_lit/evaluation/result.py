"""The records of one run of a task on one checkpoint, and what they amount to; the difference of two such runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meap_lit.evaluation.statistics import Difference, Mean, bootstrap
from meap_lit.evaluation.task import Record, Task

Cell = tuple[Any, ...]


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
