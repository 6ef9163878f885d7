"""`python -m meap_lit evaluate`: run a task on one checkpoint, or on two side by side."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from meap_lit import hub
from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.results import save, table_of
from meap_lit.evaluation.runner import (
    Overflow,
    Records,
    begun,
    check_task,
    check_writable,
    choose_items,
    download,
    fingerprint,
    num_ranks,
    predict,
    rank,
    start_ranks,
)
from meap_lit.evaluation.task import Item, Result, Task
from meap_lit.inference.language_model import Device, Dtype, LanguageModel, choose_device
from meap_lit.provenance import device_name, versions
from meap_lit.secrets import without_secrets

_WEIGHTS = (".safetensors", ".distcp")


class _Prepared(NamedTuple):
    """A checkpoint that passed all checks, with its items."""

    label: str
    model: LanguageModel
    records: Records
    items: list[Item]
    num_skipped: int


@dataclass(kw_only=True)
class Evaluate:
    """Run a task on one checkpoint, or on two to see the difference.

    Answers, scores and figures are written to OUTPUT/NAME/LABEL, those of a pair also to OUTPUT/NAME/LABEL1--LABEL2.
    The same command resumes a run that was killed.

    Args:
        task: Task to run.
        checkpoint: A Hugging Face folder, a Hub id (ORG/NAME or ORG/NAME@REVISION), a .ckpt, or the folder of a run; or
            two of them, the baseline first.
        label: Name of each checkpoint in tables and figures; derived from its path by default.
        output: Folder for results.
        name: Name of this evaluation; the task's own by default.
        batch_tokens: Maximum number of positions in a batch; a longer item is a batch of its own. Memory limits it.
        on_overflow: Stop if items are longer than the model's context, or skip and count them.
        tokenizer: Folder or Hub id of the tokenizer; the checkpoint's own by default.
        dtype: Dtype of the weights; by default bfloat16 on a GPU, and the checkpoint's own on a CPU.
        device: Device to compute on; auto takes a GPU if there is one.
        verify: Hash the checkpoint of a run and compare it with its checksums; false compares sizes only.
        base: Recipe that this one starts from, relative to its folder.
    """

    task: Task
    checkpoint: list[str]
    label: list[str] | None = None
    output: str = "evaluations"
    name: str | None = None
    batch_tokens: int = 16_384
    on_overflow: Overflow = "stop"
    tokenizer: str | None = None
    dtype: Dtype | None = None
    device: Device = "auto"
    verify: bool = True
    base: str | None = None

    def run(self) -> None:
        """Evaluate, write the results and print the table.

        Raises:
            UserError: If an option, a data file or a checkpoint is invalid.
        """
        if len(self.checkpoint) not in (1, 2):
            raise UserError(f"--checkpoint takes one checkpoint or two, got {len(self.checkpoint)}")
        check_range("batch_tokens", self.batch_tokens, "[1, inf)")
        labels = self.label or [label_of(path) for path in self.checkpoint]
        if len(labels) != len(self.checkpoint) or len(set(labels)) != len(labels):
            raise UserError(f"--label must give each checkpoint a name of its own, got {', '.join(labels)}")
        for option, names in (("label", labels), ("name", [self.name or self.task.name])):
            for name in names:
                if name in ("", ".", "..") or Path(name).name != name:
                    raise UserError(f"--{option} must be the name of a folder, without any above it, got {name!r}")
        start_ranks()
        # both checkpoints are checked before the first is evaluated
        prepared = self._prepare(labels)
        results = []
        while prepared:  # frees each model before the next is loaded
            results.append(self._evaluate(*prepared.pop(0)))
        if rank() != 0:
            return
        for result in results:
            save([result], self._folder(result.label))
        if len(results) == 2:
            save(results, self._folder("--".join(labels)))
        print(table_of(results))
        print(f"\nresults    {self._folder('--'.join(labels))}")

    def _folder(self, label: str) -> Path:
        return Path(self.output, self.name or self.task.name, label)

    def _prepare(self, labels: Sequence[str]) -> list[_Prepared]:
        """Open the checkpoints, run the cheap checks for all of them, and then make the items of each."""
        download(self.checkpoint, self.tokenizer)
        verify = self.verify and rank() == 0
        models = [LanguageModel(path, self.tokenizer, self.dtype, self._device(), verify) for path in self.checkpoint]
        now = datetime.now()
        days = [begun(self._folder(label), now) for label in labels]
        for model, day in zip(models, days, strict=True):
            model.today = day  # a chat template may write it, and prompts must not change
            check_task(self.task, model, self.on_overflow)
        found = [
            Records(
                self._folder(label),
                {
                    "task": describe(self.task),
                    **place_of(model),
                    "tokenizer": model.tokenizer.fingerprint,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "model": dataclasses.asdict(model.config),
                    **self.task.settings(model),
                    "begun": day.isoformat(),
                },
            )
            for model, label, day in zip(models, labels, days, strict=True)
        ]
        check_writable(self._folder("--".join(labels)))
        prepared = [
            _Prepared(label, model, records, *choose_items(self.task, model, self.on_overflow))
            for label, model, records in zip(labels, models, found, strict=True)
        ]
        for _, _, records, items, _ in prepared:
            records.begin(fingerprint(items))
        return prepared

    def _evaluate(
        self, label: str, model: LanguageModel, kept: Records, items: Sequence[Item], num_skipped: int
    ) -> Result:
        run = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device_name(model.device),
            "processes": num_ranks(),
            "versions": versions(),
        }
        records = predict(self.task, model, items, kept, self.batch_tokens, run)
        for record in records:
            record["scores"] = self.task.score(record)
        *earlier, last = (kept.runs() if rank() == 0 else []) or [run]
        about = {**kept.settings, "tokens_seen": model.source.tokens_seen, **last, "earlier_runs": earlier}
        return Result(self.task, label, records, num_skipped, about)

    def _device(self) -> torch.device:
        device = choose_device(self.device)
        if device.type != "cuda":
            return device
        index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= count:
            raise UserError(f"more processes than the {count} GPUs of this machine; use --nproc_per_node {count}")
        return torch.device("cuda", index)


def label_of(checkpoint: str) -> str:
    """Return a short name for a checkpoint: its last folders, without the parts that all runs share."""
    parts = [part for part in Path(checkpoint).resolve().parts if part not in ("/", "checkpoints", "runs")]
    named = next((n for n, part in enumerate(parts[::-1], 1) if not part.startswith(("version_", "step=", "last."))), 1)
    return "-".join(part.removesuffix(".ckpt") for part in parts[-named:])


def place_of(model: LanguageModel) -> dict[str, str]:
    """Return where a checkpoint is, and the state of its weights there; each machine has its own copy of a Hub id."""
    if hub.is_hub_id(model.checkpoint):
        return {"checkpoint": hub.pinned(model.checkpoint)}
    return {"checkpoint": str(model.source.path.resolve()), "weights": state_of(model.source.path)}


def state_of(path: Path) -> str:
    """Return the size and modification time of the weights, so that replaced weights are noticed."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in _WEIGHTS]
    stats = [file.stat() for file in files]
    newest = datetime.fromtimestamp(max(stat.st_mtime for stat in stats), UTC)
    return f"{sum(stat.st_size for stat in stats):,} bytes of {newest.isoformat(timespec='microseconds')}"


def describe(task: Task) -> dict[str, Any]:
    """Return class and options of a task, as in a recipe."""
    assert dataclasses.is_dataclass(task)
    options = without_secrets(dataclasses.asdict(task))
    return {"class_path": f"{type(task).__module__}.{type(task).__qualname__}", "init_args": options}
