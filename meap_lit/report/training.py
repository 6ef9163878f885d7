"""Sections on the runs themselves: setup, validation loss, retrieval over tokens, cost."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meap_lit.callbacks.summary import SUMMARY_FILE
from meap_lit.data.corpora.python_text import FILES_FILE
from meap_lit.data.read.find import RECORD_FILE
from meap_lit.data.store.manifest import MANIFEST_FILE
from meap_lit.errors import UserError
from meap_lit.evaluation.figures import curves
from meap_lit.evaluation.statistics import Difference, t_interval
from meap_lit.files import parse_json
from meap_lit.report.arms import Arm, Study, describe
from meap_lit.report.blocks import Block, Code, Heading, Paragraph, Picture, Table
from meap_lit.report.evaluations import Evaluations
from meap_lit.report.measures import Logged, in_words
from meap_lit.report.runs import ACCURACY, LOSS, Run, shown

HALF = 0.5
"""Accuracy of the probe at which retrieval has emerged."""
PROBE = Logged(ACCURACY, digits=1, scale=100)
"""Accuracy of the probe in percent."""


def setup(studies: Sequence[Study], evaluations: Evaluations) -> list[Block]:
    """Return tables of models, tokens, data, seeds, hardware and versions, and the commands."""
    arms = [(study, arm) for study in studies for arm in study.arms]
    runs = [run for _, arm in arms for run in arm.runs.values()]
    header = ["study", "arm", "differs from its baseline in", "parameters", "tokens", "seeds"]
    blocks: list[Block] = [Heading("Setup"), Table(header, [_arm_row(study, arm) for study, arm in arms])]
    unfinished = [shown(run.path) for run in runs if _is_unfinished(run)]
    if unfinished:
        blocks.append(
            Paragraph(
                f"These runs had not spent their budget when they were read, or it is in epochs and they left no "
                f"{SUMMARY_FILE}: {', '.join(unfinished)}."
            )
        )
    lost = [shown(run.path) for run in runs if run.kind == "pretraining" and not run.has_beginning]
    if lost:
        blocks.append(
            Paragraph(
                f"The beginning of these runs is not under --runs, so their earlier mask ratio is unknown and none of "
                f"them is a baseline: {', '.join(lost)}."
            )
        )
    return [
        *blocks,
        Heading("Model and training", 3),
        Table(["", *(study.title for study in studies)], _model_rows(studies)),
        Heading("Data", 3),
        *_data(runs),
        Heading("Hardware and versions", 3),
        _machines(runs, evaluations),
        Heading("Commands", 3),
        Paragraph("Of the first seed of each arm; the others differ in --seed_everything and the name of the run."),
        Code([_command(arm.any_run) for _, arm in arms]),
    ]


def _arm_row(study: Study, arm: Arm) -> list[str]:
    others = describe(arm.differs_from(arm.baseline)) if arm.baseline else "the baseline"
    size = f"{arm.any_run.num_parameters:,}"
    tokens = span(run.tokens for run in arm.runs.values())
    return [study.title, arm.name, others, size, tokens, ", ".join(arm.runs)]


def span(values: Iterable[int]) -> str:
    """Return the smallest and the largest value, or the value if they are the same."""
    found = sorted(values)
    return f"{found[0]:,}" if found[0] == found[-1] else f"{found[0]:,} to {found[-1]:,}"


def _is_unfinished(run: Run) -> bool:
    budget, summary = run.config.get("budget") or {}, run.summaries[-1]
    steps = budget.get("max_steps") or (budget.get("max_tokens") or 0) // run.tokens_per_step
    if not steps and not summary:  # how many steps its epochs have is not known
        return True
    return run.curves[LOSS][-1].step < (steps or summary.get("max_steps", 0))  # older versions kept no max_steps


def _model_rows(studies: Sequence[Study]) -> list[list[str]]:
    """Return a row for each value of the models and their training, with a column for the baseline of each study."""
    columns = []
    for study in studies:
        run = study.arms[0].any_run
        about = {**run.decoder, **{f"optimizer.{key}": value for key, value in run.model.get("optimizer", {}).items()}}
        about["datasets"] = study.arms[0].recipe.get("data.datasets")
        about |= {key: run.data.get(key) for key in ("seq_len", "val_samples", "global_batch_size")}
        about["precision"] = run.config["trainer"].get("precision")
        columns.append({key: shown(value) for key, value in about.items() if value is not None})
    keys = dict.fromkeys(key for column in columns for key in column)
    return [[key, *(column.get(key, "") for column in columns)] for key in keys]


def _data(runs: Sequence[Run]) -> Iterator[Block]:
    fingerprints: dict[str, dict[str, None]] = {}
    for run in runs:
        for path, fingerprint in run.datasets.items():
            fingerprints.setdefault(path, {})[fingerprint] = None
    rows = [[shown(path), *_dataset(path), ", ".join(found)] for path, found in fingerprints.items()]
    yield Paragraph("The hash is that of all tokens, their layout and their tokenizer, from the checkpoints.")
    yield Table(["dataset", "made by", "train tokens", "sources", "sha256"], rows)
    files = [row for path in fingerprints for row in _files_read(path)]
    if files:
        yield Paragraph("The files that the data was made of; the hash is that of the list of their hashes.")
        yield Table(["list", "side", "files", "bytes", "sha256 of the list"], files)
    changed = [shown(path) for path, found in fingerprints.items() if len(found) > 1]
    if changed:
        yield Paragraph(f"Not all runs read the same content of {', '.join(changed)}.")


def _dataset(path: str) -> list[str]:
    """Return how a dataset was made, its tokens and its sources, if it is still there."""
    manifest, record = _read_json(Path(path, MANIFEST_FILE)), _read_json(Path(path, RECORD_FILE))
    if manifest is None:
        return ["", "", "remote, not read" if "://" in path else "no longer there"]
    tokens = manifest["splits"].get("train", {}).get("tokens")
    sources = manifest["sources"]
    size = sum(source["bytes"] for source in sources)
    made_by = f"{record['step']} ({describe(record['arguments'])})" if record else ""
    return [made_by, f"{tokens:,}" if tokens else "", f"{len(sources):,} files, {size:,} bytes"]


def _files_read(dataset: str) -> Iterator[list[str]]:
    """Yield a row for each list of files beside the inputs of a dataset."""
    record = _read_json(Path(dataset, RECORD_FILE)) or {"arguments": {}}
    inputs = record["arguments"].get("input") or []
    folders = [folder for name in [dataset, *inputs] for folder in (Path(name), *Path(name).parents[:2])]
    for file in dict.fromkeys(folder / FILES_FILE for folder in folders):
        entries = _read_json(file)
        if not isinstance(entries, list):
            continue
        for side in dict.fromkeys(entry.get("side", "") for entry in entries):
            chosen = [entry for entry in entries if entry.get("side", "") == side]
            size = sum(entry["bytes"] for entry in chosen)
            digest = hashlib.sha256("\n".join(entry["sha256"] for entry in chosen).encode()).hexdigest()
            yield [shown(file), side, f"{len(chosen):,}", f"{size:,}", digest]


def _read_json(file: Path) -> Any:
    try:
        return parse_json(file.read_bytes(), str(file)) if file.is_file() else None
    except UserError as error:
        raise UserError(f"{error}; prepare its dataset anew, or move it away") from error


def _machines(runs: Sequence[Run], evaluations: Evaluations) -> Block:
    """Return hardware and versions with the number of runs and results that used them."""
    found: Counter[tuple[str, str]] = Counter()
    for run in runs:
        if about := run.summaries[-1]:
            hardware = f"{about['devices']} x {about['device']}, {about['threads']} threads, {about['platform']}"
            commit = f"; commit {about['git_commit']}" if about.get("git_commit") else ""
            found["training", f"{hardware}; {_versions(about)}{commit}"] += 1
    for results in evaluations.values():
        for result in results.values():
            hardware = f"{result.about.get('processes', 1)} x {result.about.get('device')}"
            found["evaluation", f"{hardware}; {_versions(result.about)}"] += 1
    if not found:
        return Paragraph("The runs left no summary.json, and no evaluation was found: hardware and versions unknown.")
    return Table(["", "hardware; versions", "number"], [[*machine, str(count)] for machine, count in found.items()])


def _versions(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about["versions"].items() if value)


def _command(run: Run) -> str:
    return shown(run.summaries[-1].get("command") or f"python -m meap_lit fit --config {run.path}/config.yaml")


def loss_section(study: Study) -> list[Block]:
    """Return the curves of the validation loss and its last values."""
    loss, label = Logged(LOSS), "clean validation loss (nats per token)"
    return [
        Heading("Validation loss over tokens", 3),
        Paragraph(
            "Validation never masks and reads the same data for all arms of a study, so both objectives are on one "
            "axis; lower is better. Lines are means over seeds, thin lines the seeds. Intervals are those of the "
            "paired t-test over seeds."
        ),
        _over_tokens(study, "loss", "Clean validation loss", loss, y_label=label, log_x=True),
        Table(["arm", "mean", "seeds", "difference to the baseline, 95%"], [loss.row(arm) for arm in study.arms]),
    ]


def emergence(arm: Arm) -> dict[str, float | None]:
    """Return the tokens until the probe first reached `HALF`, by seed that was probed; None where it never did."""
    found: dict[str, float | None] = {}
    for seed, run in arm.runs.items():
        points = run.over_tokens(ACCURACY)
        if points:
            found[seed] = next((float(tokens) for tokens, accuracy in points.items() if accuracy >= HALF), None)
    return found


def emergence_difference(arm: Arm) -> Difference | None:
    """Return tokens more than the baseline; None without a pair of seeds, or if one of a pair never reached `HALF`."""
    assert arm.baseline is not None
    found, baseline = emergence(arm), emergence(arm.baseline)
    deltas = []
    for seed in found.keys() & baseline.keys():
        before, after = baseline[seed], found[seed]
        if before is None or after is None:
            return None
        deltas.append(after - before)
    return t_interval(deltas) if deltas else None


def emergence_section(study: Study) -> list[Block]:
    """Return the tokens until the probe reached half, with its curves; nothing if no run was probed."""
    if not any(emergence(arm) for arm in study.arms):
        return []
    label, caption = "accuracy of the probe (%)", "Accuracy of the retrieval probe"
    num_options = (study.arms[0].any_run.config.get("probe") or {}).get("num_options")
    guess = f"; guessing gives {100 / num_options:.0f}%" if num_options else ""
    return [
        Heading("When retrieval emerges", 3),
        Paragraph(
            f"Tokens until the probe's accuracy was first {HALF:.0%} or more{guess}. The probe runs at validations "
            f"only, so these numbers are exact up to the interval between two of them."
        ),
        _over_tokens(study, "probe", caption, PROBE, y_label=label, y_range=(0, 102)),
        Table(
            ["arm", "tokens, by seed", "mean", "difference to the baseline, 95%", "last accuracy, %"],
            [_emergence_row(arm) for arm in study.arms],
        ),
    ]


def _emergence_row(arm: Arm) -> list[str]:
    seeds = emergence(arm)
    texts = [f"{seed}: {'never' if tokens is None else f'{tokens:,.0f}'}" for seed, tokens in seeds.items()]
    reached = [tokens for tokens in seeds.values() if tokens is not None]
    mean = f"{statistics.mean(reached):,.0f}" if reached and len(reached) == len(seeds) else ""
    difference = ""
    if arm.baseline is not None:
        change = emergence_difference(arm)
        difference = "no pair of seeds, or one that never did" if change is None else in_words(change, 0)
    return [arm.name, ", ".join(texts), mean, difference, PROBE.text(arm, None)]


def _over_tokens(study: Study, name: str, caption: str, logged: Logged, **how: Any) -> Picture:
    """Return the curve of each arm and of its seeds."""
    seeds = seed_lines(study, logged)
    title = f"{caption} over tokens"
    figure = curves(mean_lines(seeds), faint=seeds, x_label="tokens of training", title=title, **how)
    return Picture(study.file_name(name), figure, f"{caption} over tokens: {study.title}")


def seed_lines(study: Study, logged: Logged) -> dict[str, list[dict[Any, float]]]:
    """Return the values over tokens of the seeds of each arm that logged any."""
    lines = {}
    for arm in study.arms:
        seeds = [run.over_tokens(logged.name) for run in arm.runs.values()]
        if any(seeds):
            lines[arm.name] = [{x: logged.scale * value for x, value in seed.items()} for seed in seeds if seed]
    return lines


def mean_lines(lines: Mapping[str, Sequence[Mapping[Any, float]]]) -> dict[str, dict[Any, float]]:
    """Return the mean over the seeds of each arm, at the tokens where all of them have a value."""
    return {
        name: {x: statistics.mean(seed[x] for seed in seeds) for x in seeds[0] if all(x in seed for seed in seeds)}
        for name, seeds in lines.items()
    }


def cost_section(study: Study) -> list[Block]:
    """Return time, speed and memory of each arm, with their ratios to the baseline."""
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
    """Return an arm's value over its baseline's for each seed where both are known."""
    pairs = arm.pairs(arm.baseline) if arm.baseline else []
    values = [(value_of(first), value_of(second)) for _, first, second in pairs]
    return [second / first for first, second in values if first and second]
