"""What the evaluations say: each task arm by arm, the ablation of the mask ratio, variants at the paper's ratio."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meap_lit.evaluation.attention.segments import SEGMENTS
from meap_lit.evaluation.figures import bars, curves, heat_maps
from meap_lit.evaluation.statistics import Difference, bootstrap
from meap_lit.evaluation.tasks.perplexity import nll_by_context
from meap_lit.report.arms import Arm, Study, describe
from meap_lit.report.blocks import Block, Heading, Paragraph, Picture, Table
from meap_lit.report.evaluations import Evaluation, Evaluations, check_items, compare
from meap_lit.report.runs import ACCURACY, LOSS
from meap_lit.report.training import difference_of_runs, file_name, final_values, seed_text

Results = Mapping[Path, Evaluation]
"""Of one evaluation, by the folder of the run."""

_GRID = ("length", "depth")
_PAST_GROUPS = 24
"""A key of the cells with more values than this gets no table of its own."""


def results_of(arm: Arm, results: Results) -> dict[str, Evaluation]:
    """By seed, the results of an arm's runs."""
    return {seed: results[run.path] for seed, run in arm.runs.items() if run.path in results}


def task_sections(study: Study, evaluations: Evaluations) -> list[Block]:
    """A section for each evaluation of an arm of the study.

    Raises:
        UserError: If its runs were asked other items.
    """
    blocks: list[Block] = []
    for name, results in evaluations.items():
        arms = [arm for arm in study.arms if results_of(arm, results)]
        if arms:
            check_items([result for arm in arms for result in results_of(arm, results).values()])
            blocks += _section(study, name, arms, results)
    return blocks


def _section(study: Study, name: str, arms: Sequence[Arm], results: Results) -> list[Block]:
    any_result = next(iter(results_of(arms[0], results).values()))
    lower = "" if any_result.task_class.higher_is_better else f" Lower {any_result.metrics[0]} is better."
    options = {key: value for key, value in any_result.options.items() if value is not None}
    blocks: list[Block] = [
        Heading(name, 3),
        Paragraph(
            f"Task {any_result.task}, {len(any_result.records):,} items for each seed."
            f"{lower} Options: {describe(options)}."
        ),
    ]
    rows = []
    for metric in any_result.metrics:
        digits = digits_of(any_result, metric)
        for arm in arms:
            means = seed_means(arm, results, metric)
            if means:
                seeds = ", ".join(f"{seed}: {value:.{digits}f}" for seed, value in means.items())
                change = (
                    "" if arm.baseline is None else difference_text(compare(results, arm, arm.baseline, metric), digits)
                )
                name_and_unit = f"{metric} ({any_result.unit_of(metric)})"
                rows.append([name_and_unit, arm.name, f"{statistics.mean(means.values()):.{digits}f}", seeds, change])
    blocks.append(Table(["score", "arm", "mean", "seeds", "difference to the baseline, 95%"], rows))
    blocks.append(_picture(study, name, arms, results))
    for key in any_result.cell_keys:
        blocks += _table_along(key, arms, results, digits_of(any_result))
    if any_result.task == "attention":
        blocks += _attention_table(arms, results)
    return blocks


def digits_of(evaluation: Evaluation, metric: str | None = None) -> int:
    return 2 if evaluation.unit_of(metric or evaluation.metrics[0]) == "%" else 4


def seed_means(arm: Arm, results: Results, metric: str | None = None) -> dict[str, float]:
    """Mean over the items of each seed that was evaluated and has the metric."""
    return {seed: result.mean(metric) for seed, result in results_of(arm, results).items() if result.scored(metric)}


def difference_text(found: tuple[Difference, int] | None, digits: int) -> str:
    """A difference over seeds and items in a table's cell."""
    if found is None:
        return "no seed in common"
    change, num_seeds = found
    only = " (one seed: over items only)" if num_seeds == 1 else ""
    return f"{change.value:+.{digits}f} [{change.low:+.{digits}f}, {change.high:+.{digits}f}]{only}"


# --------------------------------------------------------------------------------------------------- pictures


def _picture(study: Study, name: str, arms: Sequence[Arm], results: Results) -> Picture:
    """Heat maps of a grid of length and depth, bars where cells have names or there are none, else curves."""
    of_arms = {arm.name: list(results_of(arm, results).values()) for arm in arms}
    any_result = of_arms[arms[0].name][0]
    file, headline, unit = file_name(study, name), any_result.metrics[0], any_result.unit
    label = f"{headline} ({unit})"
    if any_result.task == "attention_segments":
        shares = {arm.name: {part: _mean_of_seeds(arm, results, part) for part in SEGMENTS} for arm in arms}
        figure = bars(shares, x_label="segment", y_label="attention of EOS (%)")
        return Picture(file, figure, f"Where EOS looks, means over seeds: {name}")
    if any_result.task == "perplexity":
        losses = {arm: [nll_by_context(one.records) for one in seeds] for arm, seeds in of_arms.items()}
        return _curves(file, name, losses, "context (tokens, up to)", label, log_x=True)
    if unit == "%" and all(key in any_result.cell_keys and len(any_result.along(key)) > 1 for key in _GRID):
        lengths, depths = (sorted(any_result.along(key)) for key in _GRID)
        panels = {arm.name: _grid(arm, results, lengths, depths) for arm in arms}
        figure = heat_maps(panels, lengths, depths, x_label="length (tokens)", y_label="depth", title=label)
        return Picture(file, figure, f"{headline} over length and depth, means over seeds: {name}")
    key = _axis(any_result)
    if key is None:
        figure = bars({arm.name: {headline: _mean_of_seeds(arm, results)} for arm in arms}, x_label="", y_label=label)
        return Picture(file, figure, f"{headline}, means over seeds: {name}")
    lines = {arm: [one.along(key) for one in seeds] for arm, seeds in of_arms.items()}
    if not all(isinstance(x, (int, float)) for x in any_result.along(key)):
        figure = bars({arm: _mean_lines(seeds) for arm, seeds in lines.items()}, x_label=key, y_label=label)
        return Picture(file, figure, f"{headline} by {key}, means over seeds: {name}")
    how: dict[str, Any] = {"y_range": (0, 102)} if unit == "%" else {}
    if "num_options" in any_result.options:
        how["levels"] = {"guessing": 100 / any_result.options["num_options"]}
    return _curves(file, name, lines, key, label, **how)


def _curves(
    file: str, name: str, lines: Mapping[str, list[dict[Any, float]]], key: str, label: str, **how: Any
) -> Picture:
    means = {arm: _mean_lines(seeds) for arm, seeds in lines.items()}
    figure = curves(means, faint=lines, x_label=key, y_label=label, **how)
    return Picture(file, figure, f"{label} over {key}: means over seeds, and each seed (thin): {name}")


def _axis(result: Evaluation) -> str | None:
    """The key of the cells with the most values; None if all items are in one cell."""
    values = {key: len(result.along(key)) for key in result.cell_keys}
    best = max(values, key=lambda key: values[key], default=None)
    return best if best is not None and values[best] > 1 else None


def _mean_of_seeds(arm: Arm, results: Results, metric: str | None = None) -> float:
    means = seed_means(arm, results, metric)
    return statistics.mean(means.values()) if means else float("nan")


def _mean_lines(seeds: Sequence[Mapping[Any, float]]) -> dict[Any, float]:
    return {x: statistics.mean(seed[x] for seed in seeds if x in seed) for x in seeds[0]}


def _grid(arm: Arm, results: Results, lengths: Sequence[Any], depths: Sequence[Any]) -> np.ndarray:
    """Mean over seeds of each cell, [num_depths, num_lengths]; NaN where nothing was asked."""
    values = defaultdict(list)
    for result in results_of(arm, results).values():
        for cell, mean in result.along("length", "depth").items():
            values[cell].append(mean)
    cells = [[values.get((length, depth), [np.nan]) for length in lengths] for depth in depths]
    return np.array([[np.mean(cell) for cell in row] for row in cells])


def _table_along(key: str, arms: Sequence[Arm], results: Results, digits: int) -> list[Block]:
    """The headline by a key of the cells, an arm a column."""
    lines = {arm.name: _mean_lines([result.along(key) for result in results_of(arm, results).values()]) for arm in arms}
    groups = dict.fromkeys(group for line in lines.values() for group in line)
    if not 1 < len(groups) <= _PAST_GROUPS:
        return []
    rows = []
    for group in groups:
        cells = []
        for arm in arms:
            value = lines[arm.name].get(group)
            text = "" if value is None else f"{value:.{digits}f}"
            if arm.baseline is not None and text:
                change = compare(results, arm, arm.baseline, cell={key: group})
                text += "" if change is None else f" ({difference_text(change, digits).partition(' (')[0]})"
            cells.append(text)
        rows.append([f"{group:g}" if isinstance(group, float) else str(group), *cells])
    return [
        Paragraph(f"By {key}: means over seeds, and in brackets differences to the baseline."),
        Table([key, *(arm.name for arm in arms)], rows),
    ]


# -------------------------------------------------------------------------------------------------- attention

ATTENTION = (("attention", "decay", -1), ("variance", "variance increase", 1))
"""Statistic of a record, name of its change, and the sign that makes the paper's direction positive."""


def attention_change(
    arm: Arm, baseline: Arm, results: Results, statistic: str, sign: int
) -> tuple[Difference, int] | None:
    """Change in percent from the baseline on clean sequences to an arm on masked ones, as in the paper.

    The mean of the baseline, by which the changes of all sequences are divided, is taken as known.
    """
    seeds = []
    for _, first, second in arm.pairs(baseline):
        if first.path in results and second.path in results:
            clean = {record["id"]: np.mean(record["clean"][statistic]) for record in results[first.path].records}
            masked = {record["id"]: np.mean(record["masked"][statistic]) for record in results[second.path].records}
            shared = [id for id in clean if id in masked]
            mean = np.mean([clean[id] for id in shared])
            seeds.append([[float(100 * sign * (masked[id] - clean[id]) / mean)] for id in shared])
    return (bootstrap(seeds), len(seeds)) if seeds else None


def _attention_table(arms: Sequence[Arm], results: Results) -> list[Block]:
    rows = []
    for arm in arms:
        for statistic, name, sign in ATTENTION:
            control = difference_text(attention_change(arm, arm, results, statistic, sign), 2)
            change = attention_change(arm, arm.baseline, results, statistic, sign) if arm.baseline else None
            rows.append([arm.name, name, "" if change is None else difference_text(change, 2), control])
    return [
        Paragraph(
            "Attention to masked positions (decay) and variance of the weights of the others, in percent. The paper "
            "compares the baseline on clean sequences with the masked arm on masked ones; the control, the same "
            "model on both, shows what the mask in the input does by itself."
        ),
        Table(["arm", "change", "baseline clean to arm masked, 95%", "control: arm clean to arm masked, 95%"], rows),
    ]


# --------------------------------------------------------------------------------------- ablation and variants


def ablation_section(study: Study, evaluations: Evaluations) -> list[Block]:
    """Final scores over the share of masked tokens; nothing if there are fewer than two besides the baseline's."""
    arms = [arm for arm in study.arms if arm.is_plain and any(other.baseline is arm for other in study.ablation)]
    arms = sorted([*arms, *study.ablation], key=lambda arm: arm.ratio or 0)
    if len({arm.ratio for arm in study.ablation}) < 2:
        return []
    lines: dict[str, dict[Any, float]] = defaultdict(dict)
    rows = []
    columns = _columns(study, evaluations)
    for arm in arms:
        assert arm.ratio is not None
        row = [f"{arm.ratio:g}", arm.name, _loss_text(arm, arm.baseline)]
        accuracy = final_values(arm, ACCURACY)
        if accuracy:
            lines["accuracy of the probe"][arm.ratio] = 100 * statistics.mean(accuracy.values())
        row.append(f"{100 * statistics.mean(accuracy.values()):.1f}" if accuracy else "")
        for name in columns:
            row.append(_headline_text(arm, arm.baseline, evaluations[name]))
            means = seed_means(arm, evaluations[name])
            any_result = next(iter(evaluations[name].values()))
            if means and any_result.unit == "%" and "attention" not in any_result.task:
                lines[name][arm.ratio] = statistics.mean(means.values())
        rows.append(row)
    losses = {"clean validation loss": {arm.ratio: statistics.mean(final_values(arm, LOSS).values()) for arm in arms}}
    blocks: list[Block] = [
        Heading("Mask ratio", 3),
        Paragraph(
            "Arms that differ from the baseline in P only. Means over seeds, in brackets differences to the baseline."
        ),
        Table(["P", "arm", "clean validation loss", "probe, %", *columns], rows),
    ]
    if lines:
        figure = curves(lines, x_label="P", y_label="%")
        blocks.append(Picture(file_name(study, "mask_ratio"), figure, f"Scores over the mask ratio: {study.title}"))
    figure = curves(losses, x_label="P", y_label="nats")
    blocks.append(Picture(file_name(study, "mask_ratio_loss"), figure, f"Loss over the mask ratio: {study.title}"))
    return blocks


def variants_section(study: Study, evaluations: Evaluations) -> list[Block]:
    """Arms that differ in more than the share of masked tokens, beside the arm of the paper."""
    paper = study.paper_arm
    variants = [arm for arm in study.masked if arm not in study.ablation and arm is not paper]
    if not variants or paper is None:
        return []
    columns = _columns(study, evaluations)
    rows = []
    for arm in variants:
        scores = [_headline_text(arm, paper, evaluations[name]) for name in columns]
        rows.append([arm.name, describe(arm.differs_from(paper)), _loss_text(arm, paper), *scores])
    return [
        Heading("Variants", 3),
        Paragraph(
            f"Other ways of masking, compared with {paper.name}, not with the baseline: means over seeds, in brackets "
            f"the difference."
        ),
        Table(["arm", f"differs from {paper.name} in", "clean validation loss", *columns], rows),
    ]


def _columns(study: Study, evaluations: Evaluations) -> list[str]:
    return [name for name, results in evaluations.items() if any(results_of(arm, results) for arm in study.masked)]


def _loss_text(arm: Arm, other: Arm | None) -> str:
    losses = final_values(arm, LOSS)
    text = f"{statistics.mean(losses.values()):.4f}"
    return text if other is None else f"{text} ({seed_text(difference_of_runs(losses, final_values(other, LOSS)), 4)})"


def _headline_text(arm: Arm, other: Arm | None, results: Results) -> str:
    means = seed_means(arm, results)
    if not means:
        return ""
    digits = digits_of(next(iter(results.values())))
    text = f"{statistics.mean(means.values()):.{digits}f}"
    return text if other is None else f"{text} ({difference_text(compare(results, arm, other), digits)})"
