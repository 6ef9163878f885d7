"""Finished runs as they lie on disk: recipe, curves, model, and what they logged of their cost."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from meap_lit.callbacks.summary import SUMMARY_FILE
from meap_lit.checkpoint.find import newest_checkpoint
from meap_lit.checkpoint.folder import read_trainer_state
from meap_lit.errors import UserError
from meap_lit.model import DecoderConfig
from meap_lit.renamed import current

CONFIG_FILE = "config.yaml"
LOSS = "val/loss"
ACCURACY = "val/retrieval_accuracy"
Kind = Literal["pretraining", "fine-tuning"]


class Point(NamedTuple):
    """A logged value after `step` optimizer steps."""

    step: int
    value: float


@dataclass(frozen=True)
class Run:
    """A run that trained, as its folder has it.

    Args:
        path: Its folder.
        config: Content of config.yaml.
        curves: What was logged, by TensorBoard's tag.
        folders: Its own, those of the runs that it was resumed from, and that of its checkpoints.
        decoder: The model, as the newest checkpoint or the summary has it.
        datasets: Fingerprint of each dataset, by its path, from there too.
        summaries: What the callback `RunSummary` left; one for each part of a run that was resumed.
    """

    path: Path
    config: dict[str, Any]
    curves: dict[str, list[Point]]
    folders: tuple[Path, ...]
    decoder: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)
    summaries: tuple[dict[str, Any], ...] = ()

    def holds(self, path: Path) -> bool:
        """Whether a file or folder, resolved, lies in one of the run's folders or is one."""
        return any(folder.resolve() in (path, *path.parents) for folder in self.folders)

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
        return self.config["seed_everything"]

    @property
    def name(self) -> str:
        """The logger's name; of a run without one, its folder's."""
        logger = self.config["trainer"].get("logger")
        logger = logger[0] if isinstance(logger, list) else logger
        name = logger.get("init_args", {}).get("name") if isinstance(logger, dict) else None
        return str(name or self.path.name)

    @property
    def tokens_per_step(self) -> int:
        return self.data["global_batch_size"] * self.data["seq_len"]

    @property
    def tokens(self) -> int:
        """Tokens of all steps that were logged; in fine-tuning, padding and copies included."""
        return self.tokens_per_step * max(point.step for point in self.curves[LOSS])

    @cached_property
    def num_parameters(self) -> int | None:
        return None if not self.decoder else DecoderConfig(**{**self.decoder, "rope_scaling": None}).num_parameters()

    def over_tokens(self, tag: str) -> dict[int, float]:
        """Tokens to value; empty if the run did not log it."""
        return {point.step * self.tokens_per_step: point.value for point in self.curves.get(tag, [])}

    def final(self, tag: str) -> float | None:
        """The last value; None if there is none."""
        points = self.curves.get(tag)
        return points[-1].value if points else None

    # ---------------------------------------------------------------------------------------------- cost

    @property
    def seconds(self) -> float | None:
        """Wall seconds of all parts; None if one left no summary, as one that was killed and went on in its folder."""
        if not all(self.summaries) or self.summaries[0]["first_step"] > 0:
            return None
        return sum(summary["seconds"] for summary in self.summaries)

    @property
    def tokens_per_second(self) -> float | None:
        """As the last part measured it, else the mean of what was logged."""
        found = self.summaries[-1].get("tokens_per_second") if self.summaries else None
        rates = [point.value for point in self.curves.get("throughput/tokens_per_second", [])]
        return found or (sum(rates) / len(rates) if rates else None)

    @property
    def peak_memory_gb(self) -> float | None:
        points = self.curves.get("memory/gigabytes")
        return max(point.value for point in points) if points else None


def find_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders and below, each with the parts that it was resumed from.

    Raises:
        UserError: If a folder has none, or a run is not finished enough to say something of it.
    """
    paths: dict[Path, None] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--runs {folder} is no folder; name the folder of a run, or one above several")
        found = [file.parent for file in sorted(Path(folder).rglob(CONFIG_FILE)) if _events(file.parent)]
        if not found:
            raise UserError(
                f"no run found under --runs {folder}: no folder there has both {CONFIG_FILE} and events of TensorBoard"
            )
        paths.update(dict.fromkeys(found))
    configs = {path: _read_config(path) for path in paths}
    continued = {path: _resumed_from(path, configs[path], paths) for path in paths}
    ended = [path for path in paths if path not in continued.values()]
    return [_open(list(_parts(path, continued)), configs[path]) for path in ended]


def _events(folder: Path) -> list[Path]:
    return list(folder.glob("events.out.tfevents.*"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = current(yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path / CONFIG_FILE} is damaged or cut short ({reason}); leave the run out of --runs"
        ) from error
    parts = [config.get(part) if isinstance(config, dict) else None for part in ("model", "data", "trainer")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path / CONFIG_FILE} is not the recipe of a run: it has no model, data and trainer")
    return config


def _resumed_from(own: Path, config: dict[str, Any], paths: dict[Path, None]) -> Path | None:
    """The other run whose checkpoint a run went on from, if it is one of them."""
    checkpoint = config.get("ckpt_path")
    if not checkpoint:
        return None
    parents = Path(checkpoint).resolve().parents
    found = next((path for path in paths if path.resolve() in parents), None)
    return found if found != own else None  # it may have gone on in its own folder


def _parts(path: Path, continued: dict[Path, Path | None]) -> Iterator[Path]:
    """A run and the parts before it, the last first."""
    part: Path | None = path
    while part is not None:
        yield part
        part = continued[part]


def _open(parts: list[Path], config: dict[str, Any]) -> Run:
    path = parts[0]
    curves = _read_curves(path)
    for part in parts[1:]:  # a resumed run repeats the steps behind its checkpoint
        for tag, points in _read_curves(part).items():
            begin = curves[tag][0].step if curves.get(tag) else float("inf")
            curves[tag] = [*(point for point in points if point.step < begin), *curves.get(tag, [])]
    if not curves.get(LOSS):
        raise UserError(f"run {path} has no validation yet ({LOSS}); let it finish, or leave it out of --runs")
    dirpath = (config.get("checkpoint") or {}).get("dirpath")
    folders = [Path(dirpath)] if dirpath and Path(dirpath).is_dir() else parts
    checkpoint = next(filter(None, map(newest_checkpoint, folders)), None)
    summaries = tuple(_read_summary(part) for part in reversed(parts))
    run = Run(path, config, curves, (*parts, *([checkpoint.parent] if checkpoint else [])), summaries=summaries)
    if checkpoint is not None:
        return _with_checkpoint(run, checkpoint)
    if "decoder" not in summaries[-1]:
        raise UserError(
            f"run {path} has neither a whole checkpoint (checkpoints/step=N.ckpt) nor a {SUMMARY_FILE}, which a run "
            f"that has ended has; leave it out of --runs"
        )
    return replace(run, decoder=summaries[-1]["decoder"], datasets=summaries[-1]["datasets"])


def _read_curves(path: Path) -> dict[str, list[Point]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps all; what a report does not show is not kept
    kept = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1}
    events = EventAccumulator(str(path), size_guidance=kept)
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        # Lightning counts the steps before the one that logs; what a resumed run logged again counts the second time
        points = {event.step: Point(event.step + 1, event.value) for event in events.Scalars(tag)}
        curves[tag] = [points[step] for step in sorted(points)]
    return curves


def _read_summary(path: Path) -> dict[str, Any]:
    file = path / SUMMARY_FILE
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is damaged or cut short ({error}); remove it to report the run without its cost, or leave the run "
            f"out of --runs"
        ) from error


def _with_checkpoint(run: Run, file: Path) -> Run:
    content = read_trainer_state(file)
    try:
        decoder = content["decoder"]["config"]
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {file} is not one of meap_lit: it has no decoder in it") from error
    data = next((value for value in content.values() if isinstance(value, dict) and "datasets" in value), {})
    return replace(run, decoder=decoder, datasets=data.get("datasets", {}))


def shown(text: Any) -> str:
    """`text` without paths of this machine: those below the working directory become relative, of others the name."""
    text = str(text).replace(f"{Path.cwd()}/", "")
    return re.sub(r"(?<![\w.~/:-])/(?:[^\s'\",:;=/]+/)+([^\s'\",:;=/]*)", r"\1", text)
