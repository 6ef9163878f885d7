"""Runs put in order: an arm is a recipe whatever its seed, a study is arms that compare with one another."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meap_lit.errors import UserError
from meap_lit.report.runs import Kind, Run, shown

_KEPT = {
    "trainer": {"precision", "gradient_clip_val"},
    "probe": {"lengths", "depths", "num_items", "num_options", "seed", "filler"},
    "budget": {"max_tokens", "max_steps", "max_epochs"},
}
"""Of these parts what decides a result; the rest is of the machine or of what is written."""
_DROPPED = {
    "model": {"seed", "activation_checkpointing", "compile"},
    "data": {
        *("seed", "micro_batch_size", "num_workers", "preparation", "cache_dir", "cache_bytes"),
        *("storage_options", "storage_tries", "storage_timeout"),
    },
}
_RATIOS = ("mask_ratio", "mask_ratios", "start", "end")


@dataclass(eq=False)
class Arm:
    """The runs of a recipe, one for each seed.

    Args:
        recipe: The values that decide its results, by dotted key; seeds are no part of them.
        kind: What is trained.
        runs: By seed.
        origin: The arm whose runs these started from, if it is known.
        name: Unique among all arms.
        baseline: The plain arm that it is compared with; None for a plain one.
        rivals: The arms that differ from this one in the share of masked tokens only, plain ones aside.
    """

    recipe: dict[str, Any]
    kind: Kind
    runs: dict[str, Run] = field(default_factory=dict)
    origin: "Arm | None" = None
    name: str = ""
    baseline: "Arm | None" = None
    rivals: "list[Arm]" = field(default_factory=list)

    @property
    def any_run(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def ratio(self) -> float | None:
        """The share of masked tokens, where it is one number for the whole run."""
        ratio = self.recipe.get(self.ratio_key)
        return None if isinstance(ratio, str) else ratio  # a schedule's class

    @property
    def is_plain(self) -> bool:
        """Whether nothing was masked, in what it started from neither."""
        if self.origin is not None and self.kind == "pretraining" and not self.origin.is_plain:
            return False
        if not isinstance(self.recipe.get(self.ratio_key), str):
            return not self.ratio
        ratios = [self.recipe.get(f"{self.ratio_key}.{name}") for name in _RATIOS]
        return not any(any(ratio) if isinstance(ratio, list) else ratio for ratio in ratios)

    @property
    def ratio_key(self) -> str:
        return "data.duplication.mask_ratio" if self.kind == "fine-tuning" else "model.mask_ratio"

    def differs_from(self, other: "Arm") -> dict[str, Any]:
        """Values of this arm that the other has otherwise or not at all."""
        keys = dict.fromkeys([*self.recipe, *other.recipe])
        return {key: self.recipe.get(key) for key in keys if self.recipe.get(key) != other.recipe.get(key)}

    def pairs(self, other: "Arm") -> list[tuple[str, Run, Run]]:
        """Seed, run of `other`, run of this arm, for the seeds that both have."""
        return [(seed, other.runs[seed], run) for seed, run in self.runs.items() if seed in other.runs]


@dataclass
class Study:
    """Arms that compare with one another: of the same kind and shape, in fine-tuning from the same model.

    Args:
        title: What is studied.
        kind: What is trained.
        arms: Plain ones first, then by the share of masked tokens.
    """

    title: str
    kind: Kind
    arms: list[Arm]

    @property
    def slug(self) -> str:
        """The title as part of a file's name."""
        return slug(self.title)

    @property
    def masked(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.baseline is not None]

    @property
    def paper_arm(self) -> Arm | None:
        """The arm with the paper's share of masked tokens that differs least from its baseline."""
        wanted = 0.10 if self.kind == "fine-tuning" else 0.15
        return self.at_ratio(wanted)

    @property
    def ablation(self) -> list[Arm]:
        """The arms that differ from their baseline in the share of masked tokens only."""
        return [arm for arm in self.masked if arm.baseline and set(arm.differs_from(arm.baseline)) == {arm.ratio_key}]

    def at_ratio(self, ratio: float) -> Arm | None:
        arms = [arm for arm in self.masked if arm.ratio == ratio]
        return min(arms, key=lambda arm: len(arm.differs_from(arm.baseline or arm)), default=None)


def describe(values: dict[str, Any]) -> str:
    """Values of a recipe in a table's cell, without the words that all keys begin with."""
    words = {re.sub(r"^(model|data|trainer)\.", "", key): shown(value) for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in words.items())


def slug(text: str) -> str:
    """`text` as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "_", text.lower().replace(",", "")).strip("_")


def find_studies(runs: Sequence[Run]) -> list[Study]:
    """Arms and studies of all runs.

    Raises:
        UserError: If two runs have the same recipe and seed, or a study has no plain arm.
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
                f"name its runs too, or leave these out of --runs"
            )
        for arm in group:
            if not arm.is_plain:
                arm.baseline = min(plain, key=lambda other: len(arm.differs_from(other)))
            arm.rivals = [
                other
                for other in group
                if other is not arm and not other.is_plain and set(other.differs_from(arm)) == {arm.ratio_key}
            ]
        title = _title(group[0])
        titles = [study.title for study in studies]
        if title in titles:
            title += f" ({len(titles) + 1})"
        studies.append(Study(title, group[0].kind, group))
    return studies


def _find_arms(runs: Sequence[Run]) -> list[Arm]:
    arms: dict[str, Arm] = {}
    found: dict[Path, tuple[Arm, str]] = {}

    def place(run: Run) -> tuple[Arm, str]:
        """The arm of a run, and its seed: with what it started from, if that had another."""
        if run.path in found:
            return found[run.path]
        recipe, seed = recipe_of(run), str(run.seed)
        start, identity = _origin(run, runs), json.dumps(recipe, sort_keys=True)
        origin = None
        if start is not None:
            origin, earlier = place(start)
            named = {**recipe, "model.init_from": id(origin)}
            identity = json.dumps(named, sort_keys=True)
            seed = seed if seed == earlier else f"{earlier}/{seed}"
        arm = arms.setdefault(identity, Arm(recipe, run.kind, origin=origin))
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
    """The run that `model.init_from` lies in, or the last of the versions that it is the folder of."""
    start = run.model.get("init_from")
    if not start:
        return None
    path = Path(start).resolve()
    around = [other for other in runs if other.holds(path)]
    below = [other for other in runs if path == other.path.resolve().parent]
    return next(reversed(around or below), None)


def recipe_of(run: Run) -> dict[str, Any]:
    """The values of a run's recipe that decide its result, seeds aside, by dotted key. Null is as good as none."""
    config = run.config
    values: dict[str, Any] = {}
    for part in ("model", "data", "budget", "probe", "trainer"):
        section = dict(config.get(part) or {})
        arguments = section.pop("init_args", section)
        if "class_path" in section:
            values[part] = section["class_path"].rpartition(".")[2]
        for name, value in arguments.items():
            if name != "class_path" and name in _KEPT.get(part, {name}) - _DROPPED.get(part, set()):
                _flatten(f"{part}.{name}", value, values)
    return values


def _flatten(key: str, value: Any, values: dict[str, Any]) -> None:
    if not isinstance(value, dict) or key == "data.datasets":
        if value is not None:  # 0 and 0.0 are the same in a recipe, but not as text
            values[key] = int(value) if isinstance(value, float) and value.is_integer() else value
        return
    if value.get("class_path") == "meap_lit.masking.Constant":
        return _flatten(key, value["init_args"]["mask_ratio"], values)
    if "class_path" in value:
        values[key] = value["class_path"].rpartition(".")[2]
        value = value.get("init_args") or {}
    for name, inner in value.items():
        _flatten(f"{key}.{name}", inner, values)


def _study_key(arm: Arm) -> tuple[Any, ...]:
    start = arm.recipe.get("model.init_from")
    if arm.kind == "fine-tuning":
        return (arm.kind, start)
    shape = {key: value for key, value in arm.any_run.decoder.items() if key not in ("max_seq_len", "rope_theta")}
    return (arm.kind, start is not None, json.dumps(shape, sort_keys=True))


def _title(arm: Arm) -> str:
    if arm.kind == "fine-tuning":
        start = arm.origin.name if arm.origin else shown(arm.recipe.get("model.init_from", "random weights"))
        return f"Fine-tuning of {start}"
    words = "Continued pretraining" if "model.init_from" in arm.recipe else "Pretraining"
    size = arm.any_run.num_parameters
    return f"{words}, {size:,} parameters" if size else words


def _name(arms: Sequence[Arm]) -> None:
    """Name arms after their runs, without the seed; where that does not tell them apart, after P or a number too."""
    for arm in arms:
        names = {_without_seed(run.name, run.seed) for run in arm.runs.values()}
        arm.name = names.pop().strip("-_. ") if len(names) == 1 else arm.any_run.name
        arm.name = arm.name or arm.kind
    for same in _same_names(arms):
        for arm in same:
            if arm.ratio is not None:
                arm.name += f" P={arm.ratio:g}"
    for same in _same_names(arms):
        for number, arm in enumerate(same, start=1):
            arm.name += f" ({number})"


def _same_names(arms: Sequence[Arm]) -> list[list[Arm]]:
    groups: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms:
        groups[arm.name].append(arm)
    return [group for group in groups.values() if len(group) > 1]


def _without_seed(name: str, seed: int) -> str:
    return re.sub(rf"(^|[-_])(?:seed|s)?[-_=]?{seed}(?=$|[-_])", "", name)
