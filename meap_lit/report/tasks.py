"""Sections on the evaluations: each task arm by arm, the ablation of the mask ratio, variants."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from meap_lit.evaluation.attention.masked import STATISTICS
from meap_lit.evaluation.figures import curves, draw, label
from meap_lit.evaluation.statistics import Difference, bootstrap
from meap_lit.evaluation.task import Plot, Result
from meap_lit.report.arms import Arm, Study, describe
from meap_lit.report.blocks import Block, Heading, Paragraph, Picture, Table
from meap_lit.report.evaluations import Evaluations, check_items
from meap_lit.report.measures import ONE_SEED, Logged, Results, Score, in_words
from meap_lit.report.runs import LOSS, shown
from meap_lit.report.training import PROBE

_MAX_GROUPS = 24
"""Number of values up to which a key of the cells gets a table."""


def task_sections(study: Study, evaluations: Evaluations) -> Iterator[Block]:
    """Yield a section for each evaluation of an arm of the study.

    Raises:
        UserError: If its runs have other items, or scores that do not compare.
    """
    for name, results in evaluations.items():
        arms = [arm for arm in study.arms if results_of(arm, results)]
        if not arms:
            continue
        check_items([result for arm in arms for result in results_of(arm, results)])
        result = results_of(arms[0], results)[0]
        lower = "" if result.task.higher_is_better else f" Lower {result.headline} is better."
        options = describe({key: value for key, value in result.options.items() if value is not None})
        yield Heading(name, 3)
        yield Paragraph(
            f"Task {result.task.name}, {len(result.records):,} items for each seed.{lower} Options: {options}."
        )
        yield Table(
            ["score", "arm", "mean", "seeds", "difference to the baseline, 95%"],
            [
                [f"{metric} ({result.unit_of(metric)})", *score.row(arm)]
                for metric in result.metrics
                for score in [Score(results, metric)]
                for arm in arms
                if score.by_seed(arm)
            ],
        )
        yield from _elsewhere(arms, results)
        yield from _picture(study, name, {arm.name: results_of(arm, results) for arm in arms})
        for key in result.cell_keys:
            yield from _table_along(key, arms, results)
        if result.task.name == "attention":
            yield from _attention_table(arms, results)


def _elsewhere(arms: Sequence[Arm], results: Results) -> Iterator[Block]:
    """Name the results of checkpoints that are not from the end of their run."""
    runs = [run for arm in arms for run in arm.runs.values() if run.path in results]
    found = [
        f"{shown(run.path)} after {tokens:,} of {run.tokens:,} tokens"
        for run in runs
        if (tokens := results[run.path].about.get("tokens_seen")) not in (None, run.tokens)
    ]
    if found:
        yield Paragraph(f"Not evaluated at the last validation of the run: {'; '.join(found)}.")


def results_of(arm: Arm, results: Results) -> list[Result]:
    """Return the results of an arm's runs, in the order of the seeds."""
    return [results[run.path] for run in arm.runs.values() if run.path in results]


def _picture(study: Study, name: str, groups: Mapping[str, Sequence[Result]]) -> Iterator[Picture]:
    """Yield the first plot of the task, or of the headline if that has several lines for each arm."""
    result = next(iter(groups.values()))[0]
    longest = max(result.cell_keys, key=lambda key: len(result.along(key)), default="")
    plot = next(iter(result.task.plots), Plot("headline", longest))
    if len(plot.lines) > 1:
        plot = Plot("headline", longest, x_label=plot.x_label, log_x=plot.log_x, caption=plot.caption)
    figure = draw(plot, groups)
    if figure is not None:
        what = plot.value_label or f"{result.headline} ({result.task.unit})"
        caption = f"{what}, means over seeds with standard errors: {name}. {plot.caption}"
        yield Picture(study.file_name(f"evaluation {name}"), figure, caption.strip())


def _table_along(key: str, arms: Sequence[Arm], results: Results) -> Iterator[Block]:
    """Yield a table of the headline by a key of the cells, with a column for each arm."""
    groups = dict.fromkeys(group for arm in arms for result in results_of(arm, results) for group in result.along(key))
    if 1 < len(groups) <= _MAX_GROUPS:
        yield Paragraph(f"By {key}: means over seeds, and in brackets differences to the baseline.")
        scores = {group: Score(results, cell={key: group}) for group in groups}
        rows = [
            [label(group), *(score.text(arm, arm.baseline).replace(ONE_SEED, "") for arm in arms)]
            for group, score in scores.items()
        ]
        yield Table([key, *(arm.name for arm in arms)], rows)


def attention_change(arm: Arm, baseline: Arm, results: Results, statistic: str, sign: int) -> Difference | None:
    """Return the change in percent from the baseline on clean sequences to an arm on masked ones, as in the paper.

    The changes of all sequences are divided by the mean of the baseline, which is taken as known.
    """
    seeds = []
    for _, first, second in arm.pairs(baseline):
        if first.path in results and second.path in results:
            clean = {record["id"]: np.mean(record["clean"][statistic]) for record in results[first.path].records}
            masked = {record["id"]: np.mean(record["masked"][statistic]) for record in results[second.path].records}
            shared = [id for id in clean if id in masked]
            mean = np.mean([clean[id] for id in shared])
            seeds.append({id: [float(100 * sign * (masked[id] - clean[id]) / mean)] for id in shared})
    return bootstrap(seeds) if any(seeds) else None


def _attention_table(arms: Sequence[Arm], results: Results) -> Iterator[Block]:
    yield Paragraph(
        "Attention to masked positions (decay) and variance of the weights of the others, in percent. The paper "
        "compares the baseline on clean sequences with the masked arm on masked ones; the control, the same "
        "model on both, shows what the mask in the input does by itself."
    )
    rows = []
    for arm in arms:
        for statistic, name, sign in STATISTICS:
            changes = [
                attention_change(arm, other, results, statistic, sign) if other else None
                for other in (arm.baseline, arm)
            ]
            rows.append([arm.name, name, *("" if change is None else in_words(change, 2) for change in changes)])
    header = ["arm", "change", "baseline clean to arm masked, 95%", "control: arm clean to arm masked, 95%"]
    yield Table(header, rows)


def ablation_section(study: Study, evaluations: Evaluations) -> Iterator[Block]:
    """Yield final scores over the mask ratio; nothing unless there are two besides that of the baseline."""
    if len({arm.ratio for arm in study.ablation}) < 2:
        return
    plain = [arm for arm in study.arms if arm.is_plain and any(other.baseline is arm for other in study.ablation)]
    arms = sorted([*plain, *study.ablation], key=lambda arm: arm.ratio or 0)
    scores, loss = _headlines(study, evaluations), Logged(LOSS)
    rows = []
    for arm in arms:
        cells = [score.text(arm, arm.baseline) for score in scores.values()]
        rows.append([label(arm.ratio), arm.name, loss.text(arm, arm.baseline), PROBE.text(arm, None), *cells])
    yield Heading("Mask ratio", 3)
    yield Paragraph(
        "Arms that differ from the baseline in P only. Means over seeds, in brackets differences to the baseline."
    )
    yield Table(["P", "arm", "clean validation loss", "probe, %", *scores], rows)
    tasks = {name: score.result.task for name, score in scores.items()}
    drawn = [name for name, task in tasks.items() if task.unit == "%" and not task.is_analysis]
    measures = {"accuracy of the probe": PROBE, **{name: scores[name] for name in drawn}}
    lines = {
        name: {arm.ratio: measure.mean(arm) for arm in arms if measure.by_seed(arm)}
        for name, measure in measures.items()
    }
    if any(lines.values()):
        figure = curves(
            {name: line for name, line in lines.items() if line},
            x_label="mask ratio P (share of the input tokens)",
            y_label="score (%)",
            title="Scores over the mask ratio",
        )
        yield Picture(study.file_name("mask_ratio"), figure, f"Scores over the mask ratio: {study.title}")
    losses = {"clean validation loss": {arm.ratio: loss.mean(arm) for arm in arms}}
    figure = curves(
        losses,
        x_label="mask ratio P (share of the input tokens)",
        y_label="clean validation loss (nats per token)",
        title="Loss over the mask ratio",
    )
    yield Picture(study.file_name("mask_ratio_loss"), figure, f"Loss over the mask ratio: {study.title}")


def variants_section(study: Study, evaluations: Evaluations, mask_ratio: float | None) -> Iterator[Block]:
    """Yield the arms that differ in more than the mask ratio, beside the arm with `mask_ratio`."""
    paper = study.at_ratio(mask_ratio)
    variants = [arm for arm in study.masked if arm not in study.ablation and arm is not paper]
    if not variants or paper is None:
        return
    scores = _headlines(study, evaluations)
    rows = [
        [
            arm.name,
            describe(arm.differs_from(paper)),
            *(one.text(arm, paper) for one in (Logged(LOSS), *scores.values())),
        ]
        for arm in variants
    ]
    yield Heading("Variants", 3)
    yield Paragraph(
        f"Other ways of masking, compared with {paper.name}, not with the baseline: means over seeds, in brackets the "
        f"difference."
    )
    yield Table(["arm", f"differs from {paper.name} in", "clean validation loss", *scores], rows)


def _headlines(study: Study, evaluations: Evaluations) -> dict[str, Score]:
    """Return the headline of each evaluation of an arm with masks."""
    masked = [results for results in evaluations.items() if any(results_of(arm, results[1]) for arm in study.masked)]
    return {name: Score(results) for name, results in masked}
