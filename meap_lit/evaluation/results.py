"""Results on disk and on screen: `load` and `save` result.json, and `table_of` the table."""

import importlib
import inspect
import json
import math
import pkgutil
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from meap_lit.errors import UserError
from meap_lit.evaluation import attention, tasks
from meap_lit.evaluation.figures import draw, label
from meap_lit.evaluation.statistics import Mean
from meap_lit.evaluation.task import Plot, Result, Task, difference
from meap_lit.files import read_json, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT_FILE = "result.json"


@cache
def task_classes() -> dict[str, type[Task]]:
    """Return the tasks of this package by name."""
    found: dict[str, type[Task]] = {}
    for package in (tasks, attention):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and issubclass(value, Task) and not inspect.isabstract(value):
                    found[value.name] = value
    return found


def load(file: Path) -> list[Result]:
    """Read a result.json, also one of an older version: one result, or two that were evaluated side by side.

    Raises:
        UserError: If the file is not a result of `evaluate`.
    """
    content = read_json(file)
    try:
        return [
            Result(
                _task_class(content, result),
                result["label"],
                result["items"],
                result.get("skipped", 0),
                result["about"],
                file,
            )
            for result in content["results"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a result of evaluate ({error!r})") from error


def _task_class(content: dict[str, Any], result: dict[str, Any]) -> type[Task]:
    """Return the class of a task of this package, which may have moved since; for another one, what the file says."""
    name, metrics = content["task"], tuple(result["scores"])
    known = task_classes().get(name)
    if known is not None and set(metrics) <= set(known.metrics):
        return known
    return type("UnknownTask", (Task,), {"name": name, "unit": content["unit"], "metrics": metrics})


def save(results: list[Result], folder: Path) -> None:
    """Write result.json and the figures of one result, or of two side by side, into `folder`.

    Raises:
        UserError: If the scores of the two do not compare.
    """
    task = results[0].task
    if len(results) == 2:
        task.check_pair(*results)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"task": task.name, "unit": task.unit, "extra": extras(results)}
    content["results"] = [_summary(result) for result in results]
    if len(results) == 2:
        first, second = results
        content["difference"] = {metric: difference(first, second, metric).record() for metric in first.metrics}
        content["differences"] = [
            {key: group, **difference(first, second, cell={key: group}).record()}
            for key in first.cell_keys
            for group in first.along(key)
        ]
    text = json.dumps(_without_nan(content), indent=1, allow_nan=False, default=str)
    write_file(folder / RESULT_FILE, text + "\n")
    drawn = figures(results)
    plots = {plot.name: plot for plot in task.plots}
    for name, figure in drawn.items():
        if below := below_figure(plots[name], results):
            figure.supxlabel("\n".join(below), fontsize=9)
        figure.savefig(folder / f"{name}.png", dpi=120)
    _log(folder, content, drawn)


def below_figure(plot: Plot, results: list[Result]) -> list[str]:
    """Return the lines below a figure: of two results the difference by each metric that it draws, and the caption."""
    first, others = results[0], results[1:]
    metrics = [source or first.headline for source in plot.lines.values() if isinstance(source, str)]
    lines = [
        f"{metric}, difference: {difference(first, other, metric).text(num_digits(first.unit_of(metric)))}"
        for other in others
        for metric in metrics
    ]
    return lines + wrap(plot.caption, width=90)


def _summary(result: Result) -> dict[str, Any]:
    keys = result.cell_keys
    tables = {metric: result.table(metric) for metric in result.metrics}
    cells = dict.fromkeys(cell for table in tables.values() for cell in table)
    return {
        "label": result.label,
        "scores": {metric: result.mean(metric)._asdict() for metric in result.metrics},
        "skipped": result.num_skipped,
        "cells": [
            {
                **dict(zip(keys, cell, strict=True)),
                **{metric: table[cell]._asdict() for metric, table in tables.items() if cell in table},
            }
            for cell in cells
        ],
        "about": result.about,
        "items": result.records,
    }


def _without_nan(content: Any) -> Any:
    """Replace numbers that JSON cannot hold, such as the mean of nothing, by null."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _log(folder: Path, content: dict[str, Any], figures: "dict[str, Figure]") -> None:
    """Write scores and figures for TensorBoard, in the place of those of an earlier run."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for result in content["results"]:
            for metric, score in result["scores"].items():
                writer.add_scalar(f"{content['task']}/{metric}/{result['label']}", score["value"], 0)
        for name, figure in figures.items():
            writer.add_figure(f"{content['task']}/{name}", figure, 0)


def figures(results: list[Result]) -> "dict[str, Figure]":
    """Return the figures of one result or two, by the name of their file without ending."""
    groups = {result.label: [result] for result in results}
    drawn = {plot.name: draw(plot, groups) for plot in results[0].task.plots}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def extras(results: list[Result]) -> dict[str, float]:
    """Return the numbers beside the scores of one result or two, with the label of each in brackets."""
    found = {
        f"{name} ({result.label})": value for result in results for name, value in result.task.extra(result).items()
    }
    if len(results) == 2:
        first, second = results
        pair = first.task.extra_of_pair(first, second)
        found |= {f"{name} ({first.label} to {second.label})": value for name, value in pair.items()}
    return found


def table_of(results: list[Result]) -> str:
    """Return the table of one result or two: each metric over all items, then the headline by each key of the cells."""
    rows = [["", *(result.label for result in results), *(["difference"] if len(results) == 2 else [])]]
    for metric in results[0].metrics:
        unit = results[0].unit_of(metric)
        changes = [difference(results[0], other, metric).text(num_digits(unit)) for other in results[1:]]
        rows.append([metric, *(_text(result.mean(metric), unit) for result in results), *changes])
    for metric in (results[0].headline, *results[0].task.by_key):
        unit = results[0].unit_of(metric)
        for key in results[0].cell_keys:
            alongs = [result.along(key, metric) for result in results]
            if len(alongs[0]) > 1:
                rows.append([f"{metric} by {key}"])
            for group in alongs[0] if len(alongs[0]) > 1 else ():
                means = [along.get(group, Mean.of([])) for along in alongs]
                deltas = [difference(results[0], other, metric, {key: group}) for other in results[1:]]
                changes = [delta.text(num_digits(unit)) for delta in deltas]
                rows.append([f"  {label(group)}", *(_text(mean, unit) for mean in means), *changes])
    rows += [[name, f"{value:.4g}"] for name, value in extras(results).items()]
    widths = [max(len(row[n]) for row in rows if n < len(row) and len(row) > 1) for n in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    for result in results:
        skipped = f", {result.num_skipped} skipped as too long" if result.num_skipped else ""
        lines.append(f"{result.label}: {len(result.records)} items{skipped}")
    return "\n".join(lines)


def _text(mean: Mean, unit: str) -> str:
    digits = num_digits(unit)
    return f"{mean.value:.{digits}f} ± {mean.error:.{digits}f} {unit}".rstrip()


def num_digits(unit: str) -> int:
    """Return the number of decimals in tables."""
    return 2 if unit == "%" else 4
