"""Run a task: batch its items, let the model answer, and keep every answer on disk so that a killed run resumes.

Batches hold items of similar length, the longest first. Items with a common beginning share a batch, since the model
reads that beginning once. Several processes (`torchrun`) divide the items. Each writes its own file, and the first one
merges them at the end. Answers depend on the batch by rounding only. In bfloat16 that can change a greedy continuation
where two tokens are nearly as likely.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from tqdm import tqdm

from meap_lit import hub
from meap_lit.errors import UserError, shorten
from meap_lit.evaluation.rows import append_records, json_line, read_records
from meap_lit.evaluation.task import GenerationTask, Item, Record, Task
from meap_lit.files import read_json, write_file
from meap_lit.inference.generation import common_beginning
from meap_lit.inference.language_model import LanguageModel
from meap_lit.renamed import current

RECORDS_FILE = "predictions.jsonl"
SETTINGS_FILE = "settings.json"
RUNS_FILE = "runs.jsonl"
_PART = "predictions.part-*.jsonl"

_LIKENESS = 1 / 8
"""Items that are moved into a batch for their common beginning differ in length by at most this share (padding) and
have at least this share of their ids in common (read once)."""

Overflow = Literal["stop", "skip"]
T = TypeVar("T")


def check_task(task: Task, model: LanguageModel, on_overflow: Overflow) -> None:
    """Run the checks that need no items, which `choose_items` would fail only after minutes.

    Raises:
        UserError: If an option or a data file is invalid, or lengths do not fit the model's context.
    """
    extent = task.extent(model)
    if extent is None:
        return
    shortest, longest = extent
    fits = shortest <= model.config.max_seq_len
    if longest > model.config.max_seq_len and (on_overflow == "stop" or not fits):
        raise _too_long("items", task, model, longest, fits)


def choose_items(task: Task, model: LanguageModel, on_overflow: Overflow) -> tuple[list[Item], int]:
    """Return the items of a task that fit the model's context, and the number of those that do not.

    Raises:
        UserError: If one does not fit and `on_overflow` is `stop`, or none does.
    """
    items = task.items(model)
    ids = [item.id for item in items]
    assert len(set(ids)) == len(ids), f"items of {task.name} share an id"
    fitting = [item for item in items if item.num_tokens <= model.config.max_seq_len]
    num_skipped = len(items) - len(fitting)
    if num_skipped and (on_overflow == "stop" or not fitting):
        longest = max(item.num_tokens for item in items)
        raise _too_long(f"{num_skipped} of {len(items)} items", task, model, longest, bool(fitting))
    return fitting, num_skipped


def _too_long(which: str, task: Task, model: LanguageModel, longest: int, some_fit: bool) -> UserError:
    options = task.options_that_fit(model.config.max_seq_len).items()
    words = [word for name, value in options for word in (f"--task.{name}", json.dumps(value, separators=(",", ":")))]
    included = ", answer included" if isinstance(task, GenerationTask) else ""
    return UserError(
        f"{which} of {task.name} are longer than the context of {model.checkpoint}, {model.source.context}: the "
        f"longest needs {longest}{included}; "
        + (f"add {shlex.join(words)}" if words else "make the task shorter")
        + (", or leave them out with --on_overflow skip" if some_fit else "")
    )


def fingerprint(items: Sequence[Item]) -> str:
    """Return a hex SHA-256 of all items, including their data."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.cell, item.fields, item.input_ids], default=str).encode())
    return digest.hexdigest()


class Records:
    """Answers in the folder of one run of a task.

    Args:
        folder: The folder; `begin` makes it.
        settings: Everything that the answers depend on except the items.

    Raises:
        UserError: If the folder has answers of other settings, or is not writable.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self._check()
        check_writable(folder)

    def begin(self, items: str) -> None:
        """Write the settings into the folder, or compare them with those of its answers.

        Args:
            items: Fingerprint of the items.

        Raises:
            UserError: As the constructor.
        """
        if _of_first_rank(items) != items:
            raise UserError(f"process {rank()} has other items than the first; give all machines the same data files")
        self.settings["items"] = items
        self._check()
        file = self.folder / SETTINGS_FILE
        if rank() == 0 and not file.is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_file(file, json.dumps(self.settings, indent=1, default=str) + "\n")
            except OSError as error:
                raise UserError(
                    f"cannot write into {self.folder}: {error.strerror}; choose another --output"
                ) from error

    def _check(self) -> None:
        # paths and times of the same files may differ between machines
        reason = _of_first_rank(self._other_settings() if rank() == 0 else None)
        if reason is not None:
            raise UserError(reason)

    def _other_settings(self) -> str | None:
        """Return what the answers in the folder have other settings in, as a message; None if nothing."""
        file = self.folder / SETTINGS_FILE
        if not file.is_file():
            return None
        try:
            then = current(read_json(file))
        except UserError as error:
            return f"{error}; remove the folder {self.folder} to evaluate again"
        now = json.loads(json.dumps(self.settings, default=str))
        shared = [name for name in now if name in then]  # earlier versions wrote fewer
        before, after = (_flat({name: found[name] for name in shared}) for found in (then, now))
        for key in {**after, **before}:
            if before.get(key) != after.get(key):
                old, new = (shorten(" ".join(str(found.get(key)).split()), 200) for found in (before, after))
                return (
                    f"{self.folder} has answers for another {key} ({old} then, {new} now); choose another --output or "
                    f"--name, or remove that folder"
                )
        return None

    def read(self) -> dict[str, Record]:
        """Return all answers so far, by id."""
        records: dict[str, Record] = {}
        # a process that is killed while it merges leaves parts behind; only the merged file gets verdicts of judges
        for file in [*sorted(self.folder.glob(_PART)), self.folder / RECORDS_FILE]:
            records |= {record["id"]: record for record in read_records(file, ("id",), "evaluate")}
        return records

    def add(self, records: Sequence[Record]) -> None:
        """Append answers to the file of this rank, and wait until they are on disk."""
        append_records(self.folder / _PART.replace("*", str(rank())), records)

    def add_run(self, run: Mapping[str, Any]) -> None:
        """Append the date, device and versions of the command that computes the following answers."""
        append_records(self.folder / RUNS_FILE, [run])

    def runs(self) -> list[dict[str, Any]]:
        """Return what `add_run` wrote; nothing for answers of an earlier version."""
        return read_records(self.folder / RUNS_FILE, (), "evaluate")

    def finish(self, items: Sequence[Item]) -> list[Record]:
        """Merge the files of all ranks into one, in the order of the items, once every item has an answer.

        For one rank: the others could find the files half merged.
        """
        known = self.read()
        # the group is not a part of the answer: a version may draw other items together than the one that answered
        records = [{**known[item.id], "group": item.group or item.id} for item in items]
        write_records(self.folder / RECORDS_FILE, records)
        for part in self.folder.glob(_PART):
            part.unlink()
        return records


def begun(folder: Path, now: datetime) -> datetime:
    """Return when the evaluation in a folder began, the same on all ranks.

    One that begins now takes the time of the earliest evaluation beside it, so that prompts with a date are the same
    for all checkpoints.
    """
    own = folder / SETTINGS_FILE
    times = []
    for file in [own] if own.is_file() else folder.parent.glob(f"*/{SETTINGS_FILE}"):
        with suppress(UserError, KeyError, TypeError, ValueError):  # of an earlier version, or refused by `Records`
            times.append(datetime.fromisoformat(read_json(file)["begun"]))
    return _of_first_rank(min(times, default=now.replace(microsecond=0)))


def check_writable(folder: Path) -> None:
    """Raise `UserError` if `folder` cannot be made or is not writable."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    reason = "Not a directory" if not there.is_dir() else "Permission denied" if not os.access(there, os.W_OK) else None
    if reason is not None:
        raise UserError(f"cannot write into {folder}: {reason}; choose another --output")


def predict(
    task: Task,
    model: LanguageModel,
    items: Sequence[Item],
    records: Records,
    batch_tokens: int,
    run: Mapping[str, Any],
) -> list[Record]:
    """Answer the items that have no answer yet.

    Args:
        task: The task.
        model: The model; its weights are read only if an item has no answer.
        items: The items that `choose_items` returned.
        records: Answers on disk.
        batch_tokens: Maximum number of positions in a batch, including padding; a longer item is a batch of its own.
        run: Date, device and versions of this command; written if at least one item is answered.

    Returns:
        The record of each item, in their order; on ranks other than 0, nothing.
    """
    known = records.read()
    _wait_for_all()  # ranks that read after another wrote would divide the items differently
    open_items = alike_together([item for item in items if item.id not in known])
    if open_items and rank() == 0:
        records.add_run(run)
    rounds = batches(open_items, batch_tokens, lambda item: item.num_tokens, num_ranks())
    shares = (_share(batch, rank(), num_ranks()) for batch in rounds)
    mine = [batch for batch in shares if batch]
    with tqdm(total=len(items), initial=len(items) - len(open_items), desc=task.name, disable=not mine) as bar:
        for batch in mine:
            answers = task.answer(model, batch)
            records.add(
                [
                    {"id": item.id, "group": item.group or item.id, "cell": dict(item.cell), **item.fields, **answer}
                    for item, answer in zip(batch, answers, strict=True)
                ]
            )
            bar.update(len(batch))
    _wait_for_all()
    whole = records.finish(items) if rank() == 0 else []
    _wait_for_all()
    return whole


def alike_together(items: Sequence[Item]) -> list[Item]:
    """Sort items by length, longest first, but place those with a common beginning beside the longest of them."""
    runs: list[list[Item]] = []
    rest = sorted(items, key=lambda item: -item.num_tokens)
    while rest:
        num_alike = sum(item.num_tokens >= (1 - _LIKENESS) * rest[0].num_tokens for item in rest)
        # sorted by ids, an item has most in common with its neighbors
        alike, rest = sorted(rest[:num_alike], key=lambda item: item.input_ids), rest[num_alike:]
        runs.append(alike[:1])
        for item, following in pairwise(alike):
            if common_beginning(item.input_ids, following.input_ids) < _LIKENESS * following.num_tokens:
                runs.append([])
            runs[-1].append(following)
    return list(chain(*sorted(runs, key=lambda run: -max(item.num_tokens for item in run))))


def batches(
    ordered: Iterable[T], batch_tokens: int, num_tokens: Callable[[T], int], num_ranks: int = 1
) -> Iterator[list[T]]:
    """Yield batches of at most `batch_tokens` positions for each rank, including padding.

    With several ranks, a batch is divided evenly among them.
    """
    batch: list[T] = []
    longest = 0
    for item in ordered:
        longest = max(longest, num_tokens(item))
        num_rows = -(-(len(batch) + 1) // num_ranks)
        if num_rows > 1 and num_rows * longest > batch_tokens:
            yield batch
            batch, longest = [], num_tokens(item)
        batch.append(item)
    if batch:
        yield batch


def _share(batch: list[T], rank: int, num_ranks: int) -> list[T]:
    """Return the contiguous slice of a batch that one rank answers."""
    return batch[rank * len(batch) // num_ranks : (rank + 1) * len(batch) // num_ranks]


def start_ranks() -> None:
    """Initialize torch.distributed if `torchrun` started several processes.

    Raises:
        UserError: If srun started them, since each would then run alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # ranks may wait long for the slowest; torchrun ends all of them if one fails
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and not dist.is_initialized():
        raise UserError("srun started several processes that are not connected; start torchrun on each node")


def download(checkpoints: Sequence[str], tokenizer: str | None) -> None:
    """Download what Hub ids name, once on each node; all ranks then read the revisions that the first one found.

    Raises:
        UserError: If something cannot be downloaded.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for checkpoint in checkpoints:
            hub.download(checkpoint, "checkpoint")
        hub.download(tokenizer, "tokenizer", hub.TOKENIZER_FILES)
    hub.remember(_of_first_rank(hub.commits()))
    _wait_for_all()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _of_first_rank(value: T) -> T:
    """Return the value of rank 0; all ranks must call this function."""
    if not dist.is_initialized():
        return value
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    return {key: value for name, inner in settings.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}


def write_records(file: Path, records: Sequence[Record]) -> None:
    """Replace the content of a file by records, one on each line."""
    write_file(file, "".join(map(json_line, records)))
