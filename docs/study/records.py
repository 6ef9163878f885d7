"""Keep the results of a study as small files, and write its tables and figures from these alone.

    python docs/study/records.py alpaca --collect   # runs/study_real_alpaca, evaluations/study_real_alpaca -> real/
    python docs/study/records.py alpaca             # real/alpaca.csv, real/alpaca.jsonl.gz -> real/alpaca.md, .png

SETTING.csv has a line for each run. SETTING.jsonl.gz has a line for each evaluation of a run: the id, cell and scores
of every item, without its text. `--collect` adds to what is there, so parts may come from several machines.
"""

import argparse
import csv
import gzip
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meap_lit.callbacks.metrics import read_metrics
from meap_lit.errors import UserError
from meap_lit.evaluation.figures import curves
from meap_lit.evaluation.results import load, task_classes
from meap_lit.evaluation.statistics import Difference, bootstrap, t_interval
from meap_lit.evaluation.task import Record, Result, paired_deltas
from meap_lit.files import read_json

HERE = Path(__file__).parent
UNTRAINED = "untrained"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the plan of a study says of a setting.

    Args:
        name: Name of its files.
        runs: Folder of its runs in runs/ and of its evaluations in evaluations/.
        folder: Folder of its files.
        main: Evaluation of the main measure.
        hypotheses: The arms compared by it, as (arm, other): H1, H2, ...
        smallest: Smallest difference of interest, in points of the main measure.
        num_seeds: Planned seeds of these arms.
        held_out_loss: Whether one more hypothesis is about the clean loss of the first pair.
        place: Key of the cells over which the figure is drawn.
        first_place: Number of the first place in the figure, where places are counted.
        title: Title of the page and of the figure.
        x_label: What the places are.
        plan: Link to the plan.
    """

    name: str
    runs: str
    folder: str
    main: str
    hypotheses: tuple[tuple[str, str], ...]
    smallest: float
    num_seeds: int = 3
    held_out_loss: bool = False
    place: str
    first_place: int = 0
    title: str
    x_label: str
    plan: str = "plan.md"

    @property
    def baseline(self) -> str:
        return self.hypotheses[0][1]

    def file(self, suffix: str) -> Path:
        return HERE / self.folder / f"{self.name}{suffix}"


def _real(name: str, hypotheses: tuple[tuple[str, str], ...], training: str = "fine-tuning", **options: Any) -> Setting:
    return Setting(
        name=name,
        runs=f"study_real_{name}",
        folder="real",
        main="qa_5",
        hypotheses=hypotheses,
        smallest=4.0,
        place="gold",
        first_place=1,
        title=f"Questions on five passages after {training}: {name}",
        x_label="position of the passage with the answer, of five",
        plan="../plan.md",
        **options,
    )


def _facts(name: str, late: str, contexts: str) -> Setting:
    return Setting(
        name=name,
        runs=f"study_{name}",
        folder="facts",
        main="facts",
        hypotheses=((late, "ntp"), ("mask_0.15", "ntp"), (late, "mask_0.15")),
        smallest=5.0,
        place="depth",
        title=f"One of eight facts in {contexts}",
        x_label="depth of the fact in the context, from 0 (first) to 1 (last)",
    )


_ALL = (
    _real("alpaca", (("concat", "plain"), ("concat", "copies"), ("concat", "plain_79")), held_out_loss=True),
    _real("questions", (("concat", "plain"), ("concat", "copies"), ("concat", "plain_116"))),
    _real("continued", (("mask_0.15", "ntp"), ("ramp", "ntp")), "continued pretraining", num_seeds=2),
    _facts("facts", "late", "64 to 128 tokens, 10.2M tokens of training"),
    _facts("facts_256", "late_256", "128 to 256 tokens, 50M tokens of training"),
)
SETTINGS = {setting.name: setting for setting in _ALL}
RUN_FIELDS = ("arm", "seed", "steps", "tokens", "seconds", "val_loss", "masked_loss", "device")
Part = tuple[str, str]
"""Arm and seed."""


@dataclass(frozen=True)
class Study:
    """Runs by arm and seed, and results by task, then arm and seed."""

    setting: Setting
    runs: dict[Part, dict[str, str]]
    results: dict[str, dict[Part, Result]]

    @property
    def arms(self) -> list[str]:
        parts = [*self.runs, *(part for of_task in self.results.values() for part in of_task)]
        return list(dict.fromkeys(arm for arm, _ in parts))

    def seeds(self, task: str, *arms: str) -> list[str]:
        """Return the seeds with a result of the task for each of the arms."""
        found = [{seed for one, seed in self.results[task] if one == arm} for arm in arms]
        return sorted(set.intersection(*found))

    def difference(self, task: str, arm: str, other: str, metric: str | None = None) -> Difference | None:
        """Return arm minus `other`, by bootstrap over seeds and items; None if they have no seed in common."""
        results = self.results[task]
        seeds = [
            paired_deltas(results[other, seed], results[arm, seed], metric) for seed in self.seeds(task, other, arm)
        ]
        return bootstrap(seeds) if any(seeds) else None

    def over_seeds(self, arm: str, other: str) -> Difference:
        """Return arm minus `other` of the main measure, by the t interval over the means of the seeds."""
        results = self.results[self.setting.main]
        seeds = self.seeds(self.setting.main, other, arm)
        return t_interval([results[arm, seed].mean().value - results[other, seed].mean().value for seed in seeds])

    def loss_difference(self, arm: str, other: str) -> Difference | None:
        """Return arm minus `other` of the clean validation loss, by the t interval over seeds."""
        seeds = [seed for one, seed in self.runs if one == arm and (other, seed) in self.runs]
        deltas = [float(self.runs[arm, seed]["val_loss"]) - float(self.runs[other, seed]["val_loss"]) for seed in seeds]
        return t_interval(deltas) if deltas else None


def collect(setting: Setting) -> None:
    """Add what is under runs/ and evaluations/ to the files of a setting."""
    runs, lines = dict(_read_runs(setting)), dict(_read_lines(setting))
    for summary in sorted(Path("runs", setting.runs).glob("*/seed_*/summary.json")):
        arm, seed = summary.parts[-3], summary.parts[-2].removeprefix("seed_")
        about, metrics = read_json(summary), read_metrics(summary.parent)
        masked = metrics.get("train/masked_loss", [])
        values = (
            about["last_step"],
            round(metrics["throughput/tokens_seen"][-1].value),
            "" if about["first_step"] else round(about["seconds"]),  # a resumed run knows its last part only
            f"{metrics['val/loss'][-1].value:.4f}",
            f"{statistics.mean(point.value for point in masked[-10:]):.3f}" if masked else "",
            f"{about['device']}, {about['threads']} thread",
        )
        runs[arm, seed] = dict(zip(RUN_FIELDS, map(str, (arm, seed, *values)), strict=True))
    for file in sorted(Path("evaluations", setting.runs).glob("*/*/result.json")):
        for result in load(file):
            arm, _, seed = result.label.rpartition("-seed_")
            if arm != UNTRAINED and (arm, seed) not in runs:
                raise UserError(f"{file} has answers of {arm}, seed {seed}, which has no run that ended")
            name = file.parts[-3]
            lines[name, arm, seed] = {
                "name": name,
                "task": result.task.name,
                "arm": arm,
                "seed": seed,
                "items_sha256": result.about["items"],
                "skipped": result.num_skipped,
                "items": [_without_text(record) for record in result.records],
            }
    setting.file(".csv").parent.mkdir(exist_ok=True)
    with open(setting.file(".csv"), "w", encoding="utf-8", newline="") as table:
        writer = csv.DictWriter(table, RUN_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs[part] for part in sorted(runs))
    text = "".join(json.dumps(lines[key], separators=(",", ":")) + "\n" for key in sorted(lines))
    setting.file(".jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def _without_text(record: Record) -> Record:
    """Return what is kept of an item: its place and scores, and the number of words of the line that was scored."""
    kept = {key: record[key] for key in ("id", "group", "cell", "scores") if record.get(key) is not None}
    if "model_answer" in record:
        kept["words"] = len(record["model_answer"].strip().partition("\n")[0].split())
    return kept


def read(setting: Setting) -> Study:
    """Return the results that are kept of a setting."""
    results: dict[str, dict[Part, Result]] = {}
    for (name, arm, seed), line in _read_lines(setting):
        result = Result(task_classes()[line["task"]], arm, line["items"], about={"items": line["items_sha256"]})
        of_task = results.setdefault(name, {})
        of_task[arm, seed] = result
        if len({one.about["items"] for one in of_task.values()}) > 1:
            raise UserError(f"the results of {name} are of different items; evaluate {arm}, seed {seed} again")
    if setting.main not in results:
        raise UserError(f"no results of {setting.main} in {setting.file('.jsonl.gz')}; run the study, then --collect")
    return Study(setting, dict(_read_runs(setting)), results)


def _read_runs(setting: Setting) -> Iterator[tuple[Part, dict[str, str]]]:
    path = setting.file(".csv")
    if path.is_file():
        with open(path, encoding="utf-8", newline="") as table:
            yield from (((row["arm"], row["seed"]), row) for row in csv.DictReader(table))


def _read_lines(setting: Setting) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    path = setting.file(".jsonl.gz")
    if path.is_file():
        lines = map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())
        yield from (((line["name"], line["arm"], line["seed"]), line) for line in lines)


def verdict(change: Difference, setting: Setting) -> str:
    """Return what an interval of the main measure says by the rule of the plan."""
    if change.num_seeds < setting.num_seeds:
        return f"incomplete: {change.num_seeds} of {setting.num_seeds} seeds"
    if change.low > 0:
        return "above 0"
    return f"below {setting.smallest:g} points" if change.high < setting.smallest else "open"


def page(setting: Setting) -> str:
    """Return the tables of a setting in Markdown."""
    study = read(setting)
    lines = [f"# {setting.title}", "", _INTRODUCTION.format(setting=setting.name, plan=setting.plan), ""]
    lines += ["## Main measure", "", f"![Accuracy over the {setting.x_label}]({setting.name}.png)", ""]
    rows = []
    for number, (arm, other) in enumerate(setting.hypotheses, start=1):
        change = study.difference(setting.main, arm, other)
        words = ["not run", "", "", ""]
        if change is not None:
            over_seeds = study.over_seeds(arm, other)
            t_text = "" if change.num_seeds == 1 else f"[{over_seeds.low:+.1f}, {over_seeds.high:+.1f}]"
            words = [change.text(1), t_text, str(change.num_seeds), verdict(change, setting)]
        rows.append([f"H{number}", f"`{arm}` minus `{other}`", *words])
    arm, other = setting.hypotheses[0]
    clean = study.loss_difference(arm, other) if setting.held_out_loss else None
    if clean is not None and clean.num_seeds == setting.num_seeds:
        words = [clean.text(4), "", str(clean.num_seeds), "at most 0.02" if clean.high < 0.02 else "open"]
        rows.append([f"H{len(rows) + 1}", f"held-out loss, `{arm}` minus `{other}`", *words])
    lines += _table(["", "difference", "95%", "t over seeds", "seeds", "verdict"], rows)
    lengths = {arm: text for arm in study.arms if (text := _words(study, arm))}
    if lengths:
        lines += ["", "Words in the line that is scored, on average:", ""]
        lines += _table(["arm", "words, by seed"], [[f"`{arm}`", text] for arm, text in lengths.items()])
    for name, results in sorted(study.results.items(), key=lambda item: item[0] != setting.main):
        any_result = next(iter(results.values()))
        lines += [
            "" if name == setting.main else f"\n## {name}\n",
            f"{_items(results)} items for each seed, bounds included.",
        ]
        for metric in any_result.metrics:
            lines += ["", *_scores(study, name, metric)]
        for key in any_result.cell_keys:
            lines += _along(study, name, key)
    lines += ["", "## Runs", ""]
    lines += _table(list(RUN_FIELDS), [[run[field] for field in RUN_FIELDS] for run in study.runs.values()])
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


_INTRODUCTION = """`python docs/study/records.py {setting}` writes this page from the records beside it. The
[plan]({plan}) has the arms, the measures and the rules. Differences are paired over seeds and items, with a
bootstrap interval of 95%; those of the held-out loss have the t interval over seeds. A bootstrap interval of three
seeds is too narrow where seeds differ more than items, so the main measure has the t interval beside it. Verdicts
follow the plan."""


def _items(results: dict[Part, Result]) -> str:
    numbers = sorted({len(result.records) for result in results.values()})
    return " to ".join(f"{number:,}" for number in (numbers if len(numbers) == 1 else (numbers[0], numbers[-1])))


def _words(study: Study, arm: str) -> str:
    words = {
        seed: statistics.mean(record["words"] for record, _ in result.scored())
        for (one, seed), result in study.results[study.setting.main].items()
        if one == arm and "words" in result.records[0]
    }
    return ", ".join(f"{seed}: {number:.1f}" for seed, number in words.items())


def _scores(study: Study, name: str, metric: str) -> list[str]:
    results = study.results[name]
    digits = 3 if next(iter(results.values())).unit_of(metric) == "nats" else 1
    rows = []
    for arm in study.arms:
        values = {seed: result.mean(metric).value for (one, seed), result in results.items() if one == arm}
        if not values:
            continue
        baseline = study.setting.baseline
        change = None if arm == baseline else study.difference(name, arm, baseline, metric)
        of_seeds = ", ".join(f"{seed}: {value:.{digits}f}" for seed, value in values.items())
        mean = f"{statistics.mean(values.values()):.{digits}f}"
        difference = "" if change is None else f"{change.text(digits)}, seeds: {change.num_seeds}"
        rows.append([f"`{arm}`", mean, of_seeds, difference])
    unit = next(iter(results.values())).unit_of(metric)
    return _table(["arm", f"{metric} ({unit})", "by seed", f"minus `{study.setting.baseline}`"], rows)


def _along(study: Study, name: str, key: str) -> list[str]:
    """Return a table of the headline by a key of the cells; nothing if it has one value."""
    results = study.results[name]
    groups = list(dict.fromkeys(group for result in results.values() for group in result.along(key)))
    if not 1 < len(groups) <= 12:
        return []
    arms = [arm for arm in study.arms if any(one == arm for one, _ in results)]
    digits = 3 if next(iter(results.values())).task.unit == "nats" else 1
    rows = []
    for group in groups:
        cells = []
        for arm in arms:
            tables = [result.along(key) for (one, _), result in results.items() if one == arm]
            cells.append(f"{statistics.mean(table[group].value for table in tables):.{digits}f}")
        rows.append([str(group), *cells])
    counts = {arm: sum(one == arm for one, _ in results) for arm in arms}
    return ["", *_table([key, *(f"`{arm}`, seeds: {counts[arm]}" for arm in arms)], rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def draw(setting: Setting) -> None:
    """Write the figure of the main measure: means over seeds, and each seed as a thin line."""
    study = read(setting)
    tables = {part: dict(_places(result, setting)) for part, result in study.results[setting.main].items()}
    metric = next(iter(study.results[setting.main].values())).metrics[0]
    lines, faint = {}, {}
    for arm in study.arms:
        of_arm = [table for (one, _), table in tables.items() if one == arm]
        if of_arm:
            name = f"{arm}, {len(of_arm)} seed{'s' if len(of_arm) > 1 else ''}" if arm != UNTRAINED else arm
            lines[name] = {place: statistics.mean(table[place] for table in of_arm) for place in of_arm[0]}
            faint[name] = of_arm
    figure = curves(
        lines,
        x_label=setting.x_label,
        y_label=f"{metric} (%)",
        title=setting.title,
        faint=faint,
    )
    figure.savefig(setting.file(".png"), dpi=110, bbox_inches="tight", metadata={"Software": None})


def _places(result: Result, setting: Setting) -> Iterator[tuple[float, float]]:
    for place, mean in result.along(setting.place).items():
        if isinstance(place, int | float) and mean.n:
            yield place + setting.first_place, mean.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--collect", action="store_true", help="add results of runs/ and evaluations/ first")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.setting]
    if arguments.collect:
        collect(setting)
    setting.file(".md").write_text(page(setting), encoding="utf-8")
    draw(setting)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
