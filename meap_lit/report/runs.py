"""Read finished runs: recipe, curves, model and cost."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import yaml

from meap_lit.callbacks.metrics import METRICS_FILE, Point, read_metrics
from meap_lit.callbacks.summary import SUMMARY_FILE
from meap_lit.checkpoint.find import age_of, newest_checkpoint
from meap_lit.checkpoint.folder import StoredCheckpoint
from meap_lit.errors import UserError, in_one_line
from meap_lit.files import read_json
from meap_lit.model import DecoderConfig
from meap_lit.renamed import current

CONFIG_FILE = "config.yaml"
LOSS = "val/loss"
ACCURACY = "val/retrieval_accuracy"
RATIO = "mask/ratio"
Kind = Literal["pretraining", "fine-tuning"]
Curves = dict[str, list[Point]]
"""Points of each logged metric by its name, in the order of the steps."""


@dataclass(frozen=True)
class Run:
    """A run that trained, with all parts if it was resumed.

    Args:
        path: Folder of the last part.
        config: Content of config.yaml there.
        curves: Logged metrics of all parts.
        folders: Folders of all parts, the last first, and that of the checkpoints if the recipe names one.
        decoder: Configuration of the model.
        datasets: Fingerprint of each dataset by its path.
        summaries: Content of the summary.json of each part, the first part first; empty if it left none.
        earlier: Content of config.yaml of the parts before the last.
        has_beginning: Whether the first of these parts is the beginning of the training.
    """

    path: Path
    config: dict[str, Any]
    curves: Curves
    folders: tuple[Path, ...]
    decoder: dict[str, Any]
    datasets: dict[str, str]
    summaries: tuple[dict[str, Any], ...]
    earlier: tuple[dict[str, Any], ...] = ()
    has_beginning: bool = True

    def holds(self, path: Path) -> bool:
        """Return whether a resolved path is one of the run's folders or inside one.

        Checkpoints that an earlier part saved after the one that the next part resumed from do not count.
        """
        ends = [None, *(age_of(config.get("ckpt_path") or "") for config in (self.config, *self.earlier))]
        age = age_of(path)
        return any(
            _is_in(path, folder) and (end is None or age is None or age <= end)
            for folder, end in zip_longest(self.folders, ends[: 1 + len(self.earlier)])
        )

    @property
    def kind(self) -> Kind:
        return "fine-tuning" if self.config["model"]["class_path"].endswith("FineTuning") else "pretraining"

    @property
    def model(self) -> dict[str, Any]:
        return self.config["model"]["init_args"]

    @property
    def data(self) -> dict[str, Any]:
        return self.config["data"]["init_args"]

    @property
    def seed(self) -> int:
        return int(self.config["seed_everything"])

    @property
    def name(self) -> str:
        """Name of the logger, or of the folder if there is no logger."""
        logger = self.config["trainer"].get("logger")
        logger = logger[0] if isinstance(logger, list) else logger
        name = logger.get("init_args", {}).get("name") if isinstance(logger, dict) else None
        return str(name or self.path.name)

    @property
    def tokens_per_step(self) -> int:
        return self.data["global_batch_size"] * self.data["seq_len"]

    @property
    def tokens(self) -> int:
        """Tokens up to the last validation; in fine-tuning with padding and copies."""
        return self.tokens_per_step * max(point.step for point in self.curves[LOSS])

    @cached_property
    def num_parameters(self) -> int:
        return DecoderConfig(**{**self.decoder, "rope_scaling": None}).num_parameters()

    def over_tokens(self, tag: str) -> dict[int, float]:
        """Return the values of a metric by the number of tokens seen; empty if the run did not log it."""
        return {point.step * self.tokens_per_step: point.value for point in self.curves.get(tag, [])}

    def final(self, tag: str) -> float | None:
        """Return the last value of a metric, or None."""
        points = self.curves.get(tag)
        return points[-1].value if points else None

    @property
    def seconds(self) -> float | None:
        """Wall time of all parts; None if a part left no summary, such as one that was killed."""
        if not all(self.summaries) or self.summaries[0]["first_step"] > 0:
            return None
        return sum(summary["seconds"] for summary in self.summaries)

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of the last part by its summary, otherwise the mean of the logged rates."""
        rates = [point.value for point in self.curves.get("throughput/tokens_per_second", [])]
        return self.summaries[-1].get("tokens_per_second") or (sum(rates) / len(rates) if rates else None)

    @property
    def peak_memory_gb(self) -> float | None:
        return max((point.value for point in self.curves.get("memory/gigabytes", [])), default=None)


def _is_in(path: Path, folder: Path) -> bool:
    return folder.resolve() in (path, *path.parents)


def holder(path: Path, runs: Sequence[Run]) -> Run | None:
    """Return the run that holds a resolved path; None if there is none.

    If several runs share an earlier part, a run whose own folder contains the path takes precedence.
    """
    holding = [run for run in runs if run.holds(path)]
    return next((run for run in holding if _is_in(path, run.path)), holding[-1] if holding else None)


def find_runs(folders: Sequence[str]) -> list[Run]:
    """Return the runs in these folders and below, each with the parts that it was resumed from.

    Raises:
        UserError: If a folder holds no run, or a run is damaged or has no validation yet.
    """
    paths: dict[Path, None] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--runs {folder} is not a folder; name the folder of a run, or one above several")
        found = [file.parent for file in sorted(Path(folder).rglob(CONFIG_FILE)) if _has_metrics(file.parent)]
        if not found:
            raise UserError(
                f"no run found under --runs {folder}: no folder there has both {CONFIG_FILE} and {METRICS_FILE} (of an "
                f"older run: events of TensorBoard)"
            )
        paths.update(dict.fromkeys(found))
    configs = {path: _read_config(path) for path in paths}
    sources = {path: _resumed_from(configs[path], paths) for path in paths}
    continued = {
        source
        for path, source in sources.items()
        if source is not None and source != path and not _is_branch(configs[path], configs[source], source)
    }
    return [_open(_parts(path, sources), configs, sources) for path in paths if path not in continued]


def _has_metrics(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or any(folder.glob("events.out.tfevents.*"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = current(yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path / CONFIG_FILE} is damaged or cut short ({in_one_line(error)}); leave the run out of --runs"
        ) from error
    parts = [config.get(part) if isinstance(config, dict) else None for part in ("model", "data", "trainer")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path / CONFIG_FILE} is not the recipe of a run: it has no model, data and trainer")
    return config


def _resumed_from(config: dict[str, Any], paths: dict[Path, None]) -> Path | None:
    """Return the run of `paths` whose checkpoint a run resumed from; a run may resume in its own folder."""
    if not config.get("ckpt_path"):
        return None
    checkpoint = Path(config["ckpt_path"]).resolve()
    found = next((path for path in paths if path.resolve() in checkpoint.parents), None)
    return found or find_moved(checkpoint, paths)


def _is_branch(config: dict[str, Any], of_source: dict[str, Any], source: Path) -> bool:
    """Return whether a run resumed with other masks from a checkpoint that its source has trained beyond.

    Then the source is a run of its own, such as a plain run that one with masks has begun with.
    """
    age, newest = age_of(config["ckpt_path"]), newest_checkpoint(source)
    last = max(_read_summary(source).get("last_step", 0), (age_of(newest) or (0, 0))[0] if newest else 0)
    return age is not None and last > age[0] and _masks(config) != _masks(of_source)


def _masks(config: dict[str, Any]) -> tuple[Any, Any]:
    model, data = (config[part].get("init_args") or {} for part in ("model", "data"))
    return model.get("mask_ratio"), (data.get("duplication") or {}).get("mask_ratio")


def find_moved(checkpoint: Path, folders: Iterable[Path]) -> Path | None:
    """Return the folder of a run that held a checkpoint before the run was moved.

    The last two names of a run's folder decide, unless several runs have them or the checkpoint is still there.
    """
    names = [parent.parts[-2:] for parent in checkpoint.parents]
    found = [folder for folder in folders if folder.resolve().parts[-2:] in names]
    return found[0] if len(found) == 1 and not checkpoint.exists() else None


def _parts(path: Path, sources: dict[Path, Path | None]) -> list[Path]:
    """Return a run and the parts before it, the last part first."""
    before = sources[path]
    return [path] if before is None or before == path else [path, *_parts(before, sources)]


def _open(parts: list[Path], configs: dict[Path, dict[str, Any]], sources: dict[Path, Path | None]) -> Run:
    path, config = parts[0], configs[parts[0]]
    summaries = tuple(_read_summary(part) for part in reversed(parts))
    curves: Curves = {}
    start: int | None = None
    for part, summary in zip(parts, reversed(summaries), strict=True):
        curves = _continued(_read_curves(part, configs[part]), curves, start)
        age = age_of(configs[part].get("ckpt_path") or "")
        start = summary.get("first_step", age and age[0])
    if not curves.get(LOSS):
        raise UserError(f"run {path} has no validation yet ({LOSS}); let it finish, or leave it out of --runs")
    dirpath = (config.get("checkpoint") or {}).get("dirpath")
    folders = [Path(dirpath)] if dirpath and Path(dirpath).is_dir() else parts
    checkpoint = next(filter(None, map(newest_checkpoint, folders)), None)
    if "decoder" in summaries[-1]:
        model = summaries[-1]
    elif checkpoint is not None:
        model = _read_checkpoint(checkpoint)
    else:
        raise UserError(
            f"run {path} has neither a complete checkpoint (checkpoints/step=N.ckpt) nor a {SUMMARY_FILE}, which a run "
            f"writes when it ends; leave it out of --runs"
        )
    folders = [*parts, checkpoint.parent] if checkpoint and dirpath else parts
    earlier = tuple(configs[part] for part in parts[1:])
    was_lost = sources[parts[-1]] is None  # the run that the first part resumed from, at step `start`, if it did
    has_beginning = _has_beginning(curves, configs[parts[-1]], start if was_lost else None)
    return Run(
        path, config, curves, tuple(folders), model["decoder"], model["datasets"], summaries, earlier, has_beginning
    )


def _has_beginning(curves: Curves, config: dict[str, Any], start: int | None) -> bool:
    """Return whether the first logged step is one that a run from step 0 logs first.

    The first step alone cannot tell: a run that resumed in its own folder has kept only its last recipe and summary.

    Args:
        curves: Logged metrics of all parts.
        config: Recipe of the first part.
        start: Step at which the first part resumed from a checkpoint of another folder, if it did.
    """
    earliest = min((points for points in curves.values() if points), key=lambda points: points[0].step)
    first = earliest[0].step
    # the first part of a run that resumed in its own folder may have had another interval than its recipe says now
    between = earliest[1].step - first if len(earliest) > 1 else 0
    interval = max(50, config["trainer"].get("log_every_n_steps") or 50, between)
    return first <= (min(interval, start) if start else interval)


def _read_curves(path: Path, config: dict[str, Any]) -> Curves:
    curves: Curves = read_metrics(path)
    # a run of an older version has only events, and keeps them if it resumes in its folder now
    return _continued(_read_events(path), curves) if not curves or config.get("ckpt_path") else curves


def _read_events(path: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps all values; images and text are not needed
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1, "tensors": 1, "histograms": 1})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        if tag == "hp_metric":  # Lightning's logger writes it at step 0, also if the run resumes at a later one
            continue
        # Lightning counts the steps before; a run that resumed in its folder logged some steps twice
        points = {event.step: Point(event.step + 1, event.value) for event in events.Scalars(tag)}
        curves[tag] = [points[step] for step in sorted(points)]
    return curves


def _continued(earlier: Curves, later: Curves, start: int | None = None) -> Curves:
    """Return `later` with the points of `earlier` before it: a resumed run repeats the steps after its checkpoint.

    `start` is the step of that checkpoint, if it is known.
    """
    curves = dict(later)
    for tag, points in earlier.items():
        own = later.get(tag, [])
        kept = [point for point in points if start is None or point.step <= start]
        curves[tag] = [*(point for point in kept if not own or point.step < own[0].step), *own]
    return curves


def _read_summary(path: Path) -> dict[str, Any]:
    file = path / SUMMARY_FILE
    try:
        return read_json(file) if file.is_file() else {}
    except UserError as error:
        raise UserError(
            f"{error}; remove it to report the run without its cost, or leave the run out of --runs"
        ) from error


def _read_checkpoint(file: Path) -> dict[str, Any]:
    """Return `decoder` and `datasets` as a summary has them."""
    content = StoredCheckpoint(file).trainer_state
    try:
        decoder = content["decoder"]["config"]
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {file} is not one of meap_lit: it has no decoder in it") from error
    data = next((value for value in content.values() if isinstance(value, dict) and "datasets" in value), {})
    return {"decoder": decoder, "datasets": data.get("datasets", {})}


def shown(text: Any) -> str:
    """Return `text` without paths of this machine: relative below the working directory, otherwise the last name."""
    text = str(text).replace(f"{Path.cwd()}/", "")
    return re.sub(r"(?<![\w.~/:-])/(?:[^\s'\",:;=/]+/)+([^\s'\",:;=/]*)", r"\1", text)
