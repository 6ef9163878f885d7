"""Group runs: an arm is a recipe with any seed, a study is a set of arms that compare with one another."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meap_lit.callbacks import Budget, RetrievalProbe
from meap_lit.callbacks.budget import TRAINER_OPTIONS
from meap_lit.data.datamodule import StreamingData
from meap_lit.errors import UserError
from meap_lit.masking import Constant
from meap_lit.modules.base import DecoderModule
from meap_lit.report.runs import RATIO, Kind, Run, holder, shown

_PARTS: dict[str, Any] = {"model": DecoderModule, "data": StreamingData, "budget": Budget, "probe": RetrievalProbe}
"""Parts of a recipe besides `trainer`, and the classes that take them; `incidental` are options without influence."""


@dataclass(eq=False)
class Arm:
    """The runs of one recipe, one for each seed.

    Args:
        recipe: Values that decide the result, by dotted key; no seeds.
        kind: Kind of training.
        runs: Runs by seed.
        origin: Arm whose runs these started from (`model.init_from`), if it is known.
        name: Name, unique among all arms.
        baseline: Arm without masks that it is compared with; None for such an arm.
    """

    recipe: dict[str, Any]
    kind: Kind
    runs: dict[str, Run] = field(default_factory=dict)
    origin: "Arm | None" = None
    name: str = ""
    baseline: "Arm | None" = None

    @property
    def any_run(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def ratio(self) -> float | None:
        """Mask ratio; None if it changes during the run."""
        ratio = self.recipe.get(self.ratio_key)
        return None if isinstance(ratio, str) else ratio  # a schedule's class

    @property
    def is_plain(self) -> bool:
        """Whether no position was drawn for masks, neither in these runs nor in the pretraining that they started from.

        Copies whose drawn positions are not masked (`mask_inputs: false`) are not plain: they are another control.
        """
        if self.origin is not None and self.kind == "pretraining" and not self.origin.is_plain:
            return False
        # 0 or nothing; a schedule masks
        return not (self.recipe.get(self.ratio_key) or self.recipe.get(_BEFORE + self.ratio_key))

    @property
    def ratio_key(self) -> str:
        return "data.duplication.mask_ratio" if self.kind == "fine-tuning" else "model.mask_ratio"

    def differs_from(self, other: "Arm") -> dict[str, Any]:
        """Return the values of this arm where the other arm has another value or none."""
        keys = dict.fromkeys([*self.recipe, *other.recipe])
        return {key: self.recipe.get(key) for key in keys if self.recipe.get(key) != other.recipe.get(key)}

    def pairs(self, other: "Arm") -> list[tuple[str, Run, Run]]:
        """Return (seed, run of `other`, run of this arm) for the seeds of both."""
        return [(seed, other.runs[seed], run) for seed, run in self.runs.items() if seed in other.runs]


@dataclass
class Study:
    """Arms that compare with one another: same kind, shape and validation data, and for fine-tuning the same start.

    Args:
        title: Title in the report.
        kind: Kind of training.
        arms: Arms without masks first, then by mask ratio.
    """

    title: str
    kind: Kind
    arms: list[Arm]

    def file_name(self, name: str) -> str:
        """Return the name of a figure of this study, without ending."""
        return f"{slug(self.title)}_{slug(name)}"

    @property
    def masked(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.baseline is not None]

    @property
    def ablation(self) -> list[Arm]:
        """Arms that differ from their baseline in the mask ratio only."""
        return [arm for arm in self.masked if arm.baseline and set(arm.differs_from(arm.baseline)) == {arm.ratio_key}]

    def rivals(self, arm: Arm) -> list[Arm]:
        """Return the other arms with masks that differ from `arm` in the mask ratio only."""
        return [other for other in self.masked if set(other.differs_from(arm)) == {arm.ratio_key}]

    def at_ratio(self, ratio: float | None) -> Arm | None:
        """Return the arm with masks at this ratio that differs least from its baseline, if there is one."""
        masked = [arm for arm in self.masked if arm.recipe.get("data.duplication.mask_inputs") is not False]
        arms = [arm for arm in masked if arm.ratio is not None and arm.ratio == ratio]
        return min(arms, key=lambda arm: len(arm.differs_from(arm.baseline or arm)), default=None)


def describe(values: Mapping[str, Any]) -> str:
    """Return values of a recipe as a cell of a table, without the first part of their keys."""
    words = {re.sub(r"^(model|data|trainer)\.", "", key): shown(value) for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in words.items())


def slug(text: str) -> str:
    """Return `text` as part of the name of a file."""
    return re.sub(r"[^a-z0-9.]+", "_", text.lower().replace(",", "")).strip("_")


def find_studies(runs: Sequence[Run]) -> list[Study]:
    """Group all runs into arms, and arms into studies.

    Raises:
        UserError: If two runs have the same recipe and seed, or a study has no arm without masks.
    """
    arms = _find_arms(runs)
    _name(arms)
    for arm in arms:
        if arm.origin is not None:
            arm.recipe["model.init_from"] = arm.origin.name
    groups: dict[tuple[Any, ...], list[Arm]] = defaultdict(list)
    for arm in sorted(arms, key=lambda arm: (arm.kind != "pretraining", not arm.is_plain, arm.ratio or 1, arm.name)):
        groups[_study_key(arm)].append(arm)
    studies: list[Study] = []
    for group in groups.values():
        plain = [arm for arm in group if arm.is_plain]
        if not plain:
            names = ", ".join(arm.name for arm in group)
            raise UserError(
                f"no baseline ({group[0].ratio_key} 0) for the {group[0].kind} of {names}; "
                f"name its runs too, or leave these out of --runs{_not_plain(group, arms)}"
            )
        for arm in group:
            if not arm.is_plain:
                arm.baseline = min(plain, key=lambda other: len(arm.differs_from(other)))
        title = _title(group[0])
        titles = [study.title for study in studies]
        if title in titles:
            title += f" ({len(titles) + 1})"
        studies.append(Study(title, group[0].kind, group))
    return studies


def _not_plain(group: Sequence[Arm], arms: Sequence[Arm]) -> str:
    """Return in brackets why arms without masks are not the baseline of a group."""
    before = {arm.name: arm.recipe.get(_BEFORE + arm.ratio_key) for arm in group if arm.ratio == 0}
    named = [f"before {name} was resumed, its mask ratio was {value}" for name, value in before.items() if value]
    model, _ = _study_key(group[0])
    others = [arm.name for arm in arms if arm.is_plain and _study_key(arm)[0] == model]
    if others:
        named.append(
            f"validated on other data, so that losses do not compare: {', '.join(others)}; see data.datasets, "
            f"data.tokenizer, data.seq_len and data.val_samples"
        )
    return f" ({'; '.join(named)})" if named else ""


def _find_arms(runs: Sequence[Run]) -> list[Arm]:
    arms: dict[str, Arm] = {}
    found: dict[Path, tuple[Arm, str]] = {}

    def place(run: Run) -> tuple[Arm, str]:
        """Return the arm of a run, and its seed, after the seed of the run that it started from if that differs."""
        if run.path in found:
            return found[run.path]
        recipe, seed, origin = _recipe(run), str(run.seed), None
        identity = dict(recipe)
        start = _origin(run, runs)
        if start is not None:
            origin, earlier = place(start)
            identity["model.init_from"] = id(origin)
            seed = seed if seed == earlier else f"{earlier}/{seed}"
        arm = arms.setdefault(json.dumps(identity, sort_keys=True), Arm(recipe, run.kind, origin=origin))
        if seed in arm.runs:
            raise UserError(
                f"runs {arm.runs[seed].path} and {run.path} have the same recipe and seed {seed}; "
                f"leave one of them out of --runs"
            )
        arm.runs[seed] = run
        found[run.path] = arm, seed
        return found[run.path]

    for run in runs:
        place(run)
    for arm in arms.values():
        arm.runs = dict(sorted(arm.runs.items(), key=lambda item: [int(part) for part in item[0].split("/")]))
    return list(arms.values())


def _origin(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run that holds `model.init_from`, or the last version in that folder."""
    start = run.model.get("init_from")
    if not start:
        return None
    path = Path(start).resolve()
    below = [other for other in runs if path == other.path.resolve().parent]
    return holder(path, runs) or next(reversed(below), None)


_BEFORE = "before "
"""In front of the key of a value that an earlier part of a resumed run had, where the last part has another."""


def _recipe(run: Run) -> dict[str, Any]:
    """Return the recipe of a run, and what earlier parts had instead; how long a part was to last does not count."""
    recipe = recipe_of(run.config, run.datasets)
    before = _ratio_before(run, recipe)
    for config in run.earlier:
        earlier = recipe_of(config, run.datasets)
        keys = [key for key in {**recipe, **earlier} if not key.startswith(("budget.", "model.init_from"))]
        before |= {_BEFORE + key: earlier.get(key, 0) for key in keys if earlier.get(key) != recipe.get(key)}
    if run.kind == "pretraining" and not run.has_beginning:  # fine-tuning does not resume with other copies
        before[_BEFORE + "model.mask_ratio"] = "unknown"
    return recipe | before


def _ratio_before(run: Run, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mask ratio that a run has logged where its recipe has another; nothing for a schedule.

    A run that resumes in its own folder replaces its recipe there, and keeps its curves.
    """
    ratio = recipe.get("model.mask_ratio", 0)
    if isinstance(ratio, str):
        return {}
    others = sorted({round(point.value, 6) for point in run.curves.get(RATIO, ()) if abs(point.value - ratio) > 1e-6})
    before: dict[str, Any] = {}
    if others:  # several, of a schedule
        value = others[0] if len(others) == 1 else f"{others[0]:g} to {others[-1]:g}"
        _flatten(_BEFORE + "model.mask_ratio", value, before)
    return before


def recipe_of(config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a recipe that decide the result, by dotted key, without seeds and nulls.

    Datasets are named by the last part of their path and their content, which includes the tokenizer.
    """
    values: dict[str, Any] = {}
    for part, kind in _PARTS.items():
        found: dict[str, Any] = {}
        _flatten(part, config.get(part), found)
        ignored = {f"{part}.{name}" for one in (kind, *kind.__subclasses__()) for name in one.incidental}
        values |= {key: value for key, value in found.items() if ".".join(key.split(".")[:2]) not in ignored}
    for name in TRAINER_OPTIONS:
        _flatten(f"trainer.{name}", config["trainer"].get(name), values)
    datasets = values.get("data.datasets", {})
    datasets = {datasets: 1} if isinstance(datasets, str) else datasets
    if datasets and all(path in fingerprints for path in datasets):
        named = {f"{Path(path).name} ({fingerprints[path][:8]})": weight for path, weight in datasets.items()}
        values["data.datasets"] = named if len(named) > 1 else next(iter(named))
        values.pop("data.tokenizer", None)
    return values


def _flatten(key: str, value: Any, values: dict[str, Any]) -> None:
    if not isinstance(value, dict) or key == "data.datasets":
        if value is not None:  # 0 and 0.0 are equal in a recipe, but not as text
            values[key] = int(value) if isinstance(value, float) and value.is_integer() else value
        return
    if "class_path" in value:
        values[key] = value["class_path"].rpartition(".")[2]
        if values[key] == Constant.__name__:
            return _flatten(key, value["init_args"]["mask_ratio"], values)
        value = value.get("init_args") or {}
    for name, inner in value.items():
        _flatten(f"{key}.{name}", inner, values)


def _study_key(arm: Arm) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what the models and the validation data of a study have in common."""
    start, validation = arm.recipe.get("model.init_from"), _validation_data(arm.any_run)
    if arm.kind == "fine-tuning":
        return (arm.kind, start), validation
    shape = {key: value for key, value in arm.any_run.decoder.items() if key not in ("max_seq_len", "rope_theta")}
    return (arm.kind, start is not None, json.dumps(shape, sort_keys=True)), validation


def _validation_data(run: Run) -> tuple[Any, ...]:
    """Return what decides the rows of a validation: each dataset with its share, their number and their length.

    A dataset is known by its content, which includes the tokenizer, wherever it is; without it, by its folder.
    """
    weights = run.data["datasets"]
    weights = {weights: 1} if isinstance(weights, str) else weights
    content, tokenizer = [run.datasets.get(os.path.expanduser(path), "") for path in weights], None
    if not all(content):
        content = [str(Path(path).expanduser().resolve()) for path in weights]
        tokenizer = str(Path(run.data.get("tokenizer", "")).expanduser().resolve())
    total = sum(weights.values())
    shares = [round(weight / total, 12) for weight in weights.values()]
    # conversations do not see each other, so how many fill a row changes no loss
    length = run.data["seq_len"] if run.kind == "pretraining" else None
    return tuple(sorted(zip(content, shares, strict=True))), tokenizer, length, run.data.get("val_samples")


def _title(arm: Arm) -> str:
    if arm.kind == "fine-tuning":
        start = arm.origin.name if arm.origin else shown(arm.recipe.get("model.init_from", "random weights"))
        return f"Fine-tuning of {start}"
    words = "Continued pretraining" if "model.init_from" in arm.recipe else "Pretraining"
    return f"{words}, {arm.any_run.num_parameters:,} parameters"


def _name(arms: Sequence[Arm]) -> None:
    """Name arms after their runs without the seed; add P, then a number, where names are the same."""
    for arm in arms:
        names = {_without_seed(run.name, run.seed) for run in arm.runs.values()}
        arm.name = names.pop().strip("-_. ") if len(names) == 1 else arm.any_run.name
        arm.name = arm.name or arm.kind
    for with_ratio in (True, False):
        groups: dict[str, list[Arm]] = defaultdict(list)
        for arm in arms:
            groups[arm.name].append(arm)
        for same in groups.values():
            for number, arm in enumerate(same if len(same) > 1 else (), start=1):
                if not with_ratio:
                    arm.name += f" ({number})"
                elif arm.ratio is not None:
                    arm.name += f" P={arm.ratio:g}"


def _without_seed(name: str, seed: int) -> str:
    return re.sub(rf"(^|[-_])(?:seed|s)?[-_=]?{seed}(?=$|[-_])", "", name)
