"""Asks a model every item of a task and keeps each answer on disk at once, so that a killed run goes on where it was.

Items of like length share a batch, the longest first, and with them items that begin alike, of which the model reads
the beginning once. Several processes (`torchrun`) divide the items among them; each writes a file of its own, and the
first puts all together when everybody is done. What a model answers does not depend on its batch, so the scores are
those of one process.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from tqdm import tqdm

from meap_lit.errors import UserError
from meap_lit.evaluation.task import GenerationTask, Item, Record, Task
from meap_lit.inference.generation import common_beginning
from meap_lit.inference.language_model import LanguageModel
from meap_lit.renamed import current

RECORDS_FILE = "predictions.jsonl"
SETTINGS_FILE = "settings.json"
_PART = "predictions.part-*.jsonl"

_LIKENESS = 1 / 8
"""Items that share a batch out of the order of their lengths differ in length by this share at most, which is padding,
and have this share of their ids in common at least, which is not read again."""

Overflow = Literal["stop", "skip"]
T = TypeVar("T")


def check_task(task: Task, model: LanguageModel, on_overflow: Overflow) -> None:
    """Refuse at once what `choose_items` would refuse after minutes, as far as it is known before items are made.

    Raises:
        UserError: If an option or a data file is wrong, or lengths do not fit the model's context.
    """
    extent = task.extent(model)
    if extent is None:
        return
    shortest, longest = extent
    fits = shortest <= model.config.max_seq_len
    if longest > model.config.max_seq_len and (on_overflow == "stop" or not fits):
        raise _too_long("items", task, model, longest, fits)


def choose_items(task: Task, model: LanguageModel, on_overflow: Overflow) -> tuple[list[Item], int]:
    """Return the items of a task that fit the model's context, and how many do not.

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
    included = ", answer included" if isinstance(task, GenerationTask) else ""
    return UserError(
        f"{which} of {task.name} are longer than the context of {model.checkpoint}, {model.source.context}: the "
        f"longest needs {longest}{included}; make the task shorter"
        + (", or leave them out with --on_overflow skip" if some_fit else "")
    )


def fingerprint(items: Sequence[Item]) -> str:
    """Hex SHA-256 of all that a model is asked, the data of the task with it."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.cell, item.fields, item.input_ids], default=str).encode())
    return digest.hexdigest()


class Records:
    """The answers in the folder of one run of a task.

    Args:
        folder: Made by `begin` if missing.
        settings: What the answers depend on, apart from the items. A folder with the answers of other settings is
            refused.

    Raises:
        UserError: If the folder belongs to other settings, or nothing can be written there.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self._check(self.settings)
        check_writable(folder)

    def begin(self, items: str) -> None:
        """Keep the settings in the folder, or compare the items with those that its answers are of.

        Args:
            items: The items' fingerprint.

        Raises:
            UserError: As the constructor does.
        """
        self.settings["items"] = items
        self._check(self.settings)
        file = self.folder / SETTINGS_FILE
        if is_first_rank() and not file.is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _write_whole(file, json.dumps(self.settings, indent=1, default=str) + "\n")
            except OSError as error:
                raise UserError(
                    f"cannot write into {self.folder}: {error.strerror}; choose another --output"
                ) from error

    def _check(self, settings: Mapping[str, Any]) -> None:
        file = self.folder / SETTINGS_FILE
        if not file.is_file():
            return
        try:
            then = _flat(current(json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({error}); remove the folder {self.folder} to ask anew") from error
        now = _flat(json.loads(json.dumps(settings, default=str)))
        for key in now:
            if then.get(key) != now[key]:
                raise UserError(
                    f"{self.folder} holds answers for another {key} ({then.get(key)} then, {now[key]} now); choose "
                    f"another --output or --name, or remove that folder"
                )

    def read(self) -> dict[str, Record]:
        """All answers so far, by id."""
        records: dict[str, Record] = {}
        for file in [self.folder / RECORDS_FILE, *sorted(self.folder.glob(_PART))]:
            if file.is_file():
                records |= {record["id"]: record for record in _whole_lines(file)}
        return records

    def add(self, records: Sequence[Record]) -> None:
        """Append answers to the file of this rank; they are on the disk when this returns."""
        file = self.folder / _PART.replace("*", str(rank()))
        if file.is_file():
            _cut_broken_line(file)
        with open(file, "a", encoding="utf-8") as opened:
            opened.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            opened.flush()
            os.fsync(opened.fileno())

    def finish(self, items: Sequence[Item]) -> list[Record]:
        """One file of all answers, in the order of the items, when each has one; the parts go."""
        known = self.read()
        records = [known[item.id] for item in items]
        if is_first_rank():
            write_records(self.folder / RECORDS_FILE, records)
            for part in self.folder.glob(_PART):
                part.unlink()
        return records


def check_writable(folder: Path) -> None:
    """Raise UserError if `folder` cannot be made, or nothing can be written into it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    reason = "Not a directory" if not there.is_dir() else "Permission denied" if not os.access(there, os.W_OK) else None
    if reason is not None:
        raise UserError(f"cannot write into {folder}: {reason}; choose another --output")


def predict(
    task: Task, model: LanguageModel, items: Sequence[Item], records: Records, batch_tokens: int
) -> list[Record]:
    """Answer what has no answer yet.

    Args:
        task: The task.
        model: The model; its weights are read only if something is left to be answered.
        items: What `choose_items` gave.
        records: Where answers are kept.
        batch_tokens: Positions in one batch at most, padding included, unless a single item needs more.

    Returns:
        The record of each item, in their order.
    """
    known = records.read()
    _wait_for_all()  # all must have read before anybody writes, or they would divide the items differently
    open_items = alike_together([item for item in items if item.id not in known])
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
    whole = records.finish(items)
    _wait_for_all()
    return whole


def alike_together(items: Sequence[Item]) -> list[Item]:
    """Longest first, but an item that begins like others of about its length stands beside the longest of them."""
    runs: list[list[Item]] = []
    rest = sorted(items, key=lambda item: -item.num_tokens)
    while rest:
        num_alike = sum(item.num_tokens >= (1 - _LIKENESS) * rest[0].num_tokens for item in rest)
        # in the order of their ids an item has most in common with its neighbours
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
    """Whatever has a number of tokens, in batches of at most `batch_tokens` positions, padding included.

    With several ranks, batches that they are to divide evenly, each so many positions.
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
    """Of a batch for all ranks, the neighbours that one of them answers."""
    return batch[rank * len(batch) // num_ranks : (rank + 1) * len(batch) // num_ranks]


# ------------------------------------------------------------------------------------------------ processes


def start_ranks() -> None:
    """Meet the other processes, if `torchrun` started several.

    Raises:
        UserError: If another launcher did: each would take itself for the only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # who is done waits for the others, however long they take; torchrun ends all if one fails
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and not dist.is_initialized():
        raise UserError("srun started several processes that do not know of each other; let each node run torchrun")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_rank() -> bool:
    return rank() == 0


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------- files


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    return {key: value for name, inner in settings.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}


def _whole_lines(file: Path) -> Iterator[Record]:
    """The records of a file whose last line a kill may have cut."""
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
                record["id"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{file}:{number} is not an answer of evaluate ({error}); remove that line") from error
            yield record


def _cut_broken_line(file: Path) -> None:
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def write_records(file: Path, records: Sequence[Record]) -> None:
    """Put records into a file, a line each, in the place of what it held."""
    _write_whole(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _write_whole(file: Path, text: str) -> None:
    aside = file.with_name(f"{file.name}.partial-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)
