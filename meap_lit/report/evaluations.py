"""Find the results of `evaluate` and the runs that they belong to."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meap_lit.errors import UserError
from meap_lit.evaluation.results import RESULT_FILE, load
from meap_lit.evaluation.task import Result
from meap_lit.report.runs import Run, find_moved, holder

Evaluations = dict[str, dict[Path, Result]]
"""Results by the name of the evaluation, then by the folder of the run."""


def find_evaluations(folders: Sequence[str] | None, runs: Sequence[Run]) -> tuple[Evaluations, int]:
    """Return the results of these runs under the folders, and the number of results of other checkpoints.

    The checkpoint of a run that saw most tokens counts, and its newest result.

    Args:
        folders: Where to look; `evaluations` by default, if it exists.
        runs: Runs of the report.

    Raises:
        UserError: If a folder is missing, or a file is not a result of `evaluate`.
    """
    for folder in folders or ():
        if not Path(folder).is_dir():
            raise UserError(f"--evaluations {folder} is not a folder; name the one that evaluate wrote to (--output)")
    files = [file for folder in folders or ["evaluations"] for file in sorted(Path(folder).rglob(RESULT_FILE))]
    found: Evaluations = defaultdict(dict)
    num_others = 0
    for file in dict.fromkeys(files):
        result = _read(file)
        if result is None:
            continue
        run = _run_of(result, runs)
        if run is None:
            num_others += 1
            continue
        of_name = found[_name(result)]
        if run.path not in of_name or _age(result) > _age(of_name[run.path]):
            of_name[run.path] = result
    ordered = sorted(found, key=lambda name: (next(iter(found[name].values())).task.is_analysis, name))
    return {name: found[name] for name in ordered}, num_others


def _read(file: Path) -> Result | None:
    """Return the result of one checkpoint; None for two side by side, each of which has its own result."""
    try:
        results = load(file)
        if len(results) != 1:
            return None
        (result,) = results
        result.about["checkpoint"], result.about["items"], result.options
    except UserError as error:
        raise UserError(f"{error}; leave its folder out of --evaluations") from error
    except KeyError as error:
        raise UserError(f"{file} is not a result of evaluate: no {error}; leave it out of --evaluations") from error
    return result if result.metrics and result.scored() else None


def _name(result: Result) -> str:
    """Return the name of the evaluation, which is that of the folder above."""
    assert result.path is not None
    return result.path.parent.parent.name


def _run_of(result: Result, runs: Sequence[Run]) -> Run | None:
    """Return the run that the checkpoint belongs to, also if it was moved since."""
    path = Path(result.about["checkpoint"])
    if (run := holder(path, runs)) is not None:
        return run
    moved = find_moved(path, [run.path for run in runs])
    return next((run for run in runs if run.path == moved and _is_of_model(result, run)), None)


def _is_of_model(result: Result, run: Run) -> bool:
    """Return whether a result is of the run's model; a run of another study may have a folder of the same names."""
    model = result.about.get("model", {})
    return all(run.decoder[key] == model[key] for key in run.decoder.keys() & model.keys() - {"max_seq_len"})


def _age(result: Result) -> tuple[int, str]:
    return result.about.get("tokens_seen") or 0, result.about.get("date") or ""


def check_items(results: Sequence[Result]) -> None:
    """Raise `UserError` unless the results of one evaluation have the same items and comparable options."""
    first, *others = results
    for other in others:
        if other.about["items"] != first.about["items"]:
            raise UserError(
                f"evaluation {_name(first)} has other items in {other.path} than in {first.path} (hashes differ), so "
                f"their scores do not compare; give evaluate the same options for all runs, or another --name"
            )
        for key, (one, two) in _settings(first, other).items():
            if one != two:
                raise UserError(
                    f"evaluation {_name(first)} has {key} {two} in {other.path} and {one} in {first.path}, so their "
                    f"scores do not compare; give evaluate the same options for all runs, or another --name"
                )
        first.task.check_pair(first, other)


def _settings(first: Result, other: Result) -> dict[str, tuple[Any, Any]]:
    """Return the options that change the answers, with both values; options that one result lacks are omitted."""
    names = [name for name in first.task.decide_answers if name in first.options and name in other.options]
    found = {f"task.{name}": (first.options[name], other.options[name]) for name in names}
    dtypes = first.about.get("dtype"), other.about.get("dtype")
    return found | ({"dtype": dtypes} if all(dtypes) else {})
