"""Results of `evaluate` as they lie on disk, and the run that each is of."""

import importlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from meap_lit.errors import UserError
from meap_lit.evaluation.command import RESULT_FILE
from meap_lit.evaluation.statistics import Difference, bootstrap_seeds
from meap_lit.evaluation.task import Record, Task, paired_deltas
from meap_lit.renamed import current
from meap_lit.report.arms import Arm
from meap_lit.report.runs import Run


@dataclass(frozen=True)
class Evaluation:
    """The result of a task on one checkpoint.

    Args:
        path: Its result.json.
        name: The evaluation's, which is that of the folder above.
        task: The task's.
        unit: Of the headline.
        metrics: The headline first.
        records: Every item with its scores.
        about: Checkpoint, options, versions, hashes.
    """

    path: Path
    name: str
    task: str
    unit: str
    metrics: list[str]
    records: list[Record]
    about: Mapping[str, Any]

    @cached_property
    def task_class(self) -> Any:
        """The class of the task; `Task` for one that is not part of this package, which may not be at hand."""
        module, _, name = self.about["task"]["class_path"].rpartition(".")
        return getattr(importlib.import_module(module), name) if module.startswith("meap_lit.") else Task

    def unit_of(self, metric: str) -> str:
        """Unit of a score."""
        return self.task_class.other_units.get(metric, self.unit)

    @property
    def options(self) -> dict[str, Any]:
        return self.about["task"]["init_args"]

    @cached_property
    def cell_keys(self) -> list[str]:
        return list(self.records[0]["cell"]) if self.records else []

    def scored(self, metric: str | None = None) -> list[tuple[Record, float]]:
        """The records that have a score by the metric, the headline if none is named, and that score."""
        name = metric or self.metrics[0]
        return [(record, record["scores"][name]) for record in self.records if name in record["scores"]]

    def mean(self, metric: str | None = None) -> float:
        scores = [score for _, score in self.scored(metric)]
        return sum(scores) / len(scores)

    def along(self, *keys: str) -> dict[Any, float]:
        """Mean of the headline by keys of the cells, in the order of the items; by the value itself of a single key."""
        groups: dict[Any, list[float]] = defaultdict(list)
        for record, score in self.scored():
            values = tuple(record["cell"][key] for key in keys)
            groups[values if len(keys) > 1 else values[0]].append(score)
        return {group: sum(scores) / len(scores) for group, scores in groups.items()}


Evaluations = dict[str, dict[Path, Evaluation]]
"""By name, then by the folder of the run."""


def find_evaluations(folders: Sequence[str] | None, runs: Sequence[Run]) -> tuple[Evaluations, int]:
    """The evaluations of these runs under the folders, and how many results of one checkpoint belong to none of them.

    Of several checkpoints of a run the one that saw most tokens counts, of several results of it the newest.

    Args:
        folders: Where to look; `evaluations`, if it exists, if not given.
        runs: Those of the report.

    Raises:
        UserError: If a folder is missing, or a file is not one of `evaluate`.
    """
    for folder in folders or ():
        if not Path(folder).is_dir():
            raise UserError(f"--evaluations {folder} is no folder; name the one that evaluate wrote to (its --output)")
    files = [file for folder in folders or ["evaluations"] for file in sorted(Path(folder).rglob(RESULT_FILE))]
    found: Evaluations = defaultdict(dict)
    num_others = 0
    for file in dict.fromkeys(files):
        evaluation = _read(file)
        if evaluation is None:
            continue
        run = _run_of(evaluation, runs)
        if run is None:
            num_others += 1
            continue
        other = found[evaluation.name].get(run.path)
        if other is None or _age(evaluation) > _age(other):
            found[evaluation.name][run.path] = evaluation
    last = ("attention", "attention_segments")
    ordered = sorted((name for name in found if found[name]), key=lambda name: (name in last, name))
    return {name: found[name] for name in ordered}, num_others


def _read(file: Path) -> Evaluation | None:
    """None for a result of two side by side: each of them has a result of its own."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        results = content["results"]
        if len(results) > 1:
            return None
        result = results[0]
        name = file.parent.parent.name
        metrics = list(result["scores"])
        about = {**result["about"], "task": current(result["about"]["task"], "task")}
        evaluation = Evaluation(file, name, content["task"], content["unit"], metrics, result["items"], about)
        evaluation.about["checkpoint"], evaluation.about["items"], evaluation.about["task"]["init_args"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(
            f"{file} is not a result of evaluate ({error!r}); leave its folder out of --evaluations"
        ) from error
    return evaluation if evaluation.metrics and evaluation.scored() else None


def _run_of(evaluation: Evaluation, runs: Sequence[Run]) -> Run | None:
    """The run whose folder, or whose folder of checkpoints, the checkpoint lies in.

    If the runs were moved since, the last two names of a run's folder decide, where they are those of one run only.
    """
    path = Path(evaluation.about["checkpoint"])
    for run in runs:
        if run.holds(path):
            return run
    names = [parent.parts[-2:] for parent in path.parents]
    moved = [run for run in runs if run.path.resolve().parts[-2:] in names]
    return moved[0] if len(moved) == 1 and not path.exists() else None


def _age(evaluation: Evaluation) -> tuple[int, str]:
    return evaluation.about.get("tokens_seen") or 0, evaluation.about.get("date") or ""


def check_items(evaluations: Sequence[Evaluation]) -> None:
    """Raise `UserError` unless these results of one evaluation are of the same items."""
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.about["items"] != first.about["items"]:
            raise UserError(
                f"evaluation {first.name} asked other items in {other.path} than in {first.path} (hashes differ), so "
                f"they do not compare; give evaluate the same options for all runs, or another --name"
            )


def compare(
    evaluations: Mapping[Path, Evaluation],
    arm: Arm,
    baseline: Arm,
    metric: str | None = None,
    cell: Mapping[str, Any] | None = None,
) -> tuple[Difference, int] | None:
    """Difference to the baseline over the seeds evaluated in both, and how many those are; None without one."""
    seeds = [
        paired_deltas(evaluations[first.path].scored(metric), evaluations[second.path].scored(metric), cell)
        for _, first, second in arm.pairs(baseline)
        if first.path in evaluations and second.path in evaluations
    ]
    seeds = [groups for groups in seeds if groups]
    return (bootstrap_seeds(seeds), len(seeds)) if seeds else None
