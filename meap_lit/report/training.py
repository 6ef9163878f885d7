"""What the runs themselves say: setup, validation loss, when retrieval emerges, cost."""

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meap_lit.data.read.find import RECORD_FILE
from meap_lit.data.store.manifest import MANIFEST_FILE
from meap_lit.errors import UserError
from meap_lit.evaluation.figures import curves
from meap_lit.report.arms import Arm, Study, describe, slug
from meap_lit.report.blocks import Block, Code, Heading, Paragraph, Picture, Table
from meap_lit.report.differences import SeedDifference, seed_difference
from meap_lit.report.evaluations import Evaluations
from meap_lit.report.runs import ACCURACY, LOSS, Run, shown

HALF = 0.5
"""Accuracy of the probe at which retrieval counts as having emerged."""
FILES_FILE = "files.json"
"""Where a step of the preparation lists the files that it read: a list of {file, bytes, sha256, ...}."""


# --------------------------------------------------------------------------------------------------- setup


def setup(studies: Sequence[Study], evaluations: Evaluations) -> list[Block]:
    """Model, tokens, data, seeds, hardware, versions and commands."""
    blocks: list[Block] = [Heading("Setup")]
    rows = []
    for study in studies:
        for arm in study.arms:
            run = arm.any_run
            others = describe(arm.differs_from(arm.baseline)) if arm.baseline else "the baseline"
            tokens = "to ".join(
                dict.fromkeys(f"{count:,} " for count in _ends(run.tokens for run in arm.runs.values()))
            )
            size = f"{run.num_parameters:,}" if run.num_parameters else ""
            rows.append([study.title, arm.name, others, size, tokens.strip(), ", ".join(arm.runs)])
    blocks.append(Table(["study", "arm", "differs from its baseline in", "parameters", "tokens", "seeds"], rows))
    runs = [run for study in studies for arm in study.arms for run in arm.runs.values()]
    unfinished = [shown(run.path) for run in runs if _is_unfinished(run)]
    if unfinished:
        blocks.append(Paragraph(f"These runs had not spent their budget when they were read: {', '.join(unfinished)}."))
    blocks += [Heading("Model and training", 3), Table(["", *(study.title for study in studies)], _model_rows(studies))]
    blocks += [Heading("Data", 3), *_data(runs)]
    blocks += [Heading("Hardware and versions", 3), *_machines(runs, evaluations)]
    commands = [_command(arm.any_run) for study in studies for arm in study.arms]
    blocks += [
        Heading("Commands", 3),
        Paragraph("Of the first seed of each arm; the others differ in --seed_everything and the name of the run."),
        Code(commands),
    ]
    return blocks


def _ends(values: Iterable[int]) -> list[int]:
    found = sorted(values)
    return [found[0], found[-1]]


def _is_unfinished(run: Run) -> bool:
    budget = run.config.get("budget") or {}
    steps = budget.get("max_steps") or (budget.get("max_tokens") or 0) // run.tokens_per_step
    return run.curves[LOSS][-1].step < steps


def _model_rows(studies: Sequence[Study]) -> list[list[str]]:
    """Rows of what the baseline of each study is."""
    columns = []
    for study in studies:
        run = study.arms[0].any_run
        about = {**run.decoder, **{f"optimizer.{key}": value for key, value in run.model.get("optimizer", {}).items()}}
        about |= {key: run.data.get(key) for key in ("seq_len", "global_batch_size")}
        about["precision"] = run.config["trainer"].get("precision")
        columns.append({key: shown(value) for key, value in about.items() if value is not None})
    keys = dict.fromkeys(key for column in columns for key in column)
    return [[key, *(column.get(key, "") for column in columns)] for key in keys]


def _data(runs: Sequence[Run]) -> list[Block]:
    fingerprints: dict[str, dict[str, None]] = {}
    for run in runs:
        for path, fingerprint in run.datasets.items():
            fingerprints.setdefault(path, {})[fingerprint] = None
    rows = [[shown(path), *_dataset(path), ", ".join(found)] for path, found in fingerprints.items()]
    text = "The hash is that of all tokens, their layout and their tokenizer, as the checkpoints have it."
    blocks: list[Block] = [Paragraph(text), Table(["dataset", "made by", "train tokens", "sources", "sha256"], rows)]
    files = [row for path in fingerprints for row in _files_read(path)]
    if files:
        blocks.append(Paragraph("The files that the data was made of; the hash is that of the list of their hashes."))
        blocks.append(Table(["list", "side", "files", "bytes", "sha256 of the list"], files))
    changed = [shown(path) for path, found in fingerprints.items() if len(found) > 1]
    if changed:
        blocks.append(Paragraph(f"Not all runs read the same content of {', '.join(changed)}."))
    return blocks


def _dataset(path: str) -> list[str]:
    """How a dataset that is still there was made, its tokens, its sources."""
    manifest, record = _read_json(Path(path, MANIFEST_FILE)), _read_json(Path(path, RECORD_FILE))
    if manifest is None:
        return ["", "", "no longer there"]
    train = manifest["splits"].get("train", {})
    tokens = train.get("tokens")
    sources = manifest["sources"]
    size = sum(source["bytes"] for source in sources)
    made_by = f"{record['step']} ({describe(record['arguments'])})" if record else ""
    return [made_by, f"{tokens:,}" if tokens else "", f"{len(sources):,} files, {size:,} bytes"]


def _files_read(dataset: str) -> list[list[str]]:
    """Rows for the lists of files beside the inputs of a dataset's preparation."""
    record = _read_json(Path(dataset, RECORD_FILE)) or {"arguments": {}}
    inputs = record["arguments"].get("input") or []
    folders = [folder for name in [dataset, *inputs] for folder in (Path(name), *Path(name).parents[:2])]
    rows = []
    for file in dict.fromkeys(folder / FILES_FILE for folder in folders):
        entries = _read_json(file)
        if not isinstance(entries, list):
            continue
        for side in dict.fromkeys(entry.get("side", "") for entry in entries):
            chosen = [entry for entry in entries if entry.get("side", "") == side]
            hashes = "\n".join(entry["sha256"] for entry in chosen)
            size = sum(entry["bytes"] for entry in chosen)
            digest = hashlib.sha256(hashes.encode()).hexdigest()
            rows.append([shown(file), side, f"{len(chosen):,}", f"{size:,}", digest])
    return rows


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); prepare its dataset anew, or move it away") from error


def _machines(runs: Sequence[Run], evaluations: Evaluations) -> list[Block]:
    """Rows of what was used, each with the number of runs and results that say so."""
    found: dict[tuple[str, str], int] = {}
    for run in runs:
        for about in run.summaries[-1:]:
            if about:
                hardware = f"{about['devices']} x {about['device']}, {about['threads']} threads, {about['platform']}"
                _count(found, "training", hardware, about["versions"], about.get("git_commit"))
    for results in evaluations.values():
        for evaluation in results.values():
            about = dict(evaluation.about)
            _count(found, "evaluation", f"{about.get('processes', 1)} x {about.get('device')}", about["versions"], None)
    if not found:
        return [Paragraph("The runs left no summary.json, and no evaluation was found: hardware and versions unknown.")]
    rows = [[what, text, str(count)] for (what, text), count in found.items()]
    return [Table(["", "hardware; versions", "number"], rows)]


def _count(
    found: dict[tuple[str, str], int], what: str, hardware: str, versions: Mapping[str, Any], commit: Any
) -> None:
    names = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    key = (what, f"{hardware}; {names}" + (f"; commit {commit}" if commit else ""))
    found[key] = found.get(key, 0) + 1


def _command(run: Run) -> str:
    command = run.summaries[-1].get("command") if run.summaries else None
    return shown(command or f"python -m meap_lit fit --config {run.path}/config.yaml")


# ------------------------------------------------------------------------------------------- loss, retrieval


def final_values(arm: Arm, tag: str) -> dict[str, float]:
    """The last logged value of each seed that has one."""
    values = {seed: run.final(tag) for seed, run in arm.runs.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def difference_of_runs(values: Mapping[str, float], baseline: Mapping[str, float]) -> SeedDifference | None:
    """Over the seeds that have a value in both; None without one."""
    deltas = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    return seed_difference(deltas) if deltas else None


def emergence(arm: Arm) -> dict[str, float | None]:
    """Tokens until the probe first reached `HALF`, of each seed that was probed; None where it never did."""
    found: dict[str, float | None] = {}
    for seed, run in arm.runs.items():
        points = run.over_tokens(ACCURACY)
        if points:
            found[seed] = next((float(tokens) for tokens, accuracy in points.items() if accuracy >= HALF), None)
    return found


def loss_section(study: Study) -> list[Block]:
    """Curves, and the last values."""
    rows = [_row(arm, final_values(arm, LOSS), _loss_of_baseline(arm), 4) for arm in study.arms]
    figure = curves(
        mean_lines(study, LOSS),
        faint=seed_lines(study, LOSS),
        x_label="tokens",
        y_label="clean validation loss (nats)",
        log_x=True,
    )
    return [
        Heading("Validation loss over tokens", 3),
        Paragraph(
            "Validation never masks, so both objectives are on one axis; lower is better. Lines are means over seeds, "
            "thin lines the seeds. Intervals are those of the paired t-test over seeds."
        ),
        Picture(file_name(study, "loss"), figure, f"Clean validation loss over tokens: {study.title}"),
        Table(["arm", "mean", "seeds", "difference to the baseline, 95%"], rows),
    ]


def emergence_section(study: Study) -> list[Block]:
    """Tokens until the probe's accuracy passed half, with its curves; nothing if no run was probed."""
    found = {arm.name: emergence(arm) for arm in study.arms}
    if not any(found.values()):
        return []
    rows = []
    for arm in study.arms:
        seeds = found[arm.name]
        texts = [f"{seed}: {'never' if tokens is None else f'{tokens:,.0f}'}" for seed, tokens in seeds.items()]
        reached = {seed: tokens for seed, tokens in seeds.items() if tokens is not None}
        mean = f"{statistics.mean(reached.values()):,.0f}" if reached and len(reached) == len(seeds) else ""
        change = "" if arm.baseline is None else _emergence_text(emergence_difference(arm))
        accuracy = final_values(arm, ACCURACY)
        last = f"{100 * statistics.mean(accuracy.values()):.1f}" if accuracy else ""
        rows.append([arm.name, ", ".join(texts), mean, change, last])
    figure = curves(
        mean_lines(study, ACCURACY, scale=100),
        faint=seed_lines(study, ACCURACY, scale=100),
        x_label="tokens",
        y_label="accuracy of the probe (%)",
        y_range=(0, 102),
    )
    options = study.arms[0].any_run.config.get("probe") or {}
    chance = 100 / options["num_options"] if options.get("num_options") else None
    guess = f"; guessing gives {chance:.0f}%" if chance else ""
    return [
        Heading("When retrieval emerges", 3),
        Paragraph(
            f"Tokens until the probe's accuracy was first {HALF:.0%} or more{guess}. It is asked at validations only, "
            f"so these numbers are known no better than the interval between two of them."
        ),
        Picture(file_name(study, "probe"), figure, f"Accuracy of the retrieval probe over tokens: {study.title}"),
        Table(["arm", "tokens, by seed", "mean", "difference to the baseline, 95%", "last accuracy, %"], rows),
    ]


def emergence_difference(arm: Arm) -> SeedDifference | None:
    """Tokens more than the baseline; None if there is no pair, or one of a pair never reached `HALF`."""
    assert arm.baseline is not None
    found, baseline = emergence(arm), emergence(arm.baseline)
    shared = [seed for seed in found if seed in baseline]
    deltas = [(found[seed], baseline[seed]) for seed in shared]
    if not deltas or any(tokens is None for pair in deltas for tokens in pair):
        return None
    return seed_difference([after - before for after, before in deltas if after is not None and before is not None])


def _emergence_text(change: SeedDifference | None) -> str:
    return "no pair of seeds, or one that never did" if change is None else seed_text(change, 0)


def _loss_of_baseline(arm: Arm) -> Mapping[str, float] | None:
    return final_values(arm.baseline, LOSS) if arm.baseline else None


def _row(arm: Arm, values: Mapping[str, float], baseline: Mapping[str, float] | None, digits: int) -> list[str]:
    seeds = ", ".join(f"{seed}: {value:.{digits}f}" for seed, value in values.items())
    change = difference_of_runs(values, baseline) if baseline is not None else None
    text = "" if baseline is None else seed_text(change, digits)
    return [arm.name, f"{statistics.mean(values.values()):.{digits}f}", seeds, text]


def seed_text(change: SeedDifference | None, digits: int) -> str:
    """A difference over seeds in a table's cell."""
    if change is None:
        return "no seed in common"
    if change.num_seeds < 2:
        return f"{change.value:+,.{digits}f} (one seed, no interval)"
    return f"{change.value:+,.{digits}f} [{change.low:+,.{digits}f}, {change.high:+,.{digits}f}]"


def mean_lines(study: Study, tag: str, scale: float = 1) -> dict[str, dict[Any, float]]:
    """Mean over the seeds of each arm at the tokens that all of them logged, for `curves`."""
    lines = {}
    for name, seeds in seed_lines(study, tag, scale).items():
        shared = [x for x in seeds[0] if all(x in seed for seed in seeds)]
        lines[name] = {x: statistics.mean(seed[x] for seed in seeds) for x in shared}
    return lines


def seed_lines(study: Study, tag: str, scale: float = 1) -> dict[str, list[dict[Any, float]]]:
    """For each arm the curve of each seed that logged it."""
    lines = {}
    for arm in study.arms:
        seeds = [run.over_tokens(tag) for run in arm.runs.values() if run.curves.get(tag)]
        if seeds:
            lines[arm.name] = [{x: scale * value for x, value in seed.items()} for seed in seeds]
    return lines


def file_name(study: Study, name: str) -> str:
    """Of a figure of a study."""
    return f"{study.slug}_{slug(name)}"


# ----------------------------------------------------------------------------------------------------- cost


def cost_section(study: Study) -> list[Block]:
    """Time, memory and speed of each arm, and their ratio to the baseline."""
    columns: dict[str, tuple[Callable[[Run], float | None], str]] = {
        "seconds": (lambda run: run.seconds, ",.0f"),
        "tokens per second": (lambda run: run.tokens_per_second, ",.0f"),
        "peak memory, GB": (lambda run: run.peak_memory_gb, ".2f"),
    }
    rows = []
    for arm in study.arms:
        row = [arm.name]
        for value_of, form in columns.values():
            values = [value for value in map(value_of, arm.runs.values()) if value is not None]
            text = format(statistics.mean(values), form) if values else "not recorded"
            found = ratios(arm, value_of)
            row.append(f"{text} (x {statistics.mean(found):.3f})" if found else text)
        rows.append(row)
    return [
        Heading("Cost", 3),
        Paragraph(
            "Means over seeds, in brackets the mean ratio to the baseline's run of the same seed. Seconds include "
            "validation, probes and checkpoints, tokens per second do not; memory is that of the first process. Runs "
            "that shared a machine with other work are slower than they need be."
        ),
        Table(["arm", *columns], rows),
    ]


def ratios(arm: Arm, value_of: Callable[[Run], float | None]) -> list[float]:
    """An arm's value by its baseline's, of each seed where both are known; none of a baseline."""
    pairs = (
        [(value_of(first), value_of(second)) for _, first, second in arm.pairs(arm.baseline)] if arm.baseline else []
    )
    return [second / first for first, second in pairs if first and second]
