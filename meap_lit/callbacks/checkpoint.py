"""Save checkpoints aside, whole, and rename them; refuse to resume from a damaged one."""

import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from meap_lit.callbacks.budget import Budget
from meap_lit.checkpoint.checksums import check, checksums, seal, to_disk
from meap_lit.checkpoint.folder import StoredCheckpoint, read_trainer_state, write
from meap_lit.errors import UserError, check_range
from meap_lit.files import has_ended
from meap_lit.parallel.ranks import Ranks
from meap_lit.parallel.strategies import Sharded

LAST = "last.ckpt"
_ASIDE = ".partial-"
"""In the name of a checkpoint that is being written or removed; such a name does not end in .ckpt."""

_SECONDS_PER_DAY = 86_400


class Checkpoint(ModelCheckpoint):
    """Keep the last checkpoints of a run, always including the final step, and a link `last.ckpt` to the newest.

    All ranks write a checkpoint under another name; it gets its checksums, and takes its own name when it is whole.
    Then `last.ckpt` moves to it in one step, and only then is an old one removed. A kill at any moment leaves the
    previous checkpoint and nothing that could be taken for a new one. The next save of a run of the same recipe removes
    what it leaves aside.

    The state is taken at the end of a step. It is written when Lightning has logged that step and validated, before the
    next step, so that no value up to a checkpoint is missing from the logs.

    With `asynchronous` a save copies the state to the host's memory, and a thread does the rest while training
    continues. A save that fails ends the run a little later, and a new save waits for the last.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: Number of checkpoints to keep; -1 keeps all.
        milestone_every_n_steps: Never remove checkpoints at multiples of this many steps.
        asynchronous: Write while training continues; needs memory on the host for one copy of what a rank writes.
        dirpath: Folder; `checkpoints` inside the logger's folder if not given.
        verify: Hash the checkpoint that a run resumes from, or starts from (`model.init_from`), before it is read;
            false compares sizes only.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        keep: int = 2,
        milestone_every_n_steps: int | None = None,
        asynchronous: bool = False,
        dirpath: str | None = None,
        verify: bool = True,
    ) -> None:
        check_range("checkpoint.every_n_steps", every_n_steps, "[1, inf)")
        if keep < 1 and keep != -1:
            raise UserError(f"checkpoint.keep must be at least 1, or -1 for all, got {keep}")
        if milestone_every_n_steps is not None and (
            milestone_every_n_steps < 1 or milestone_every_n_steps % every_n_steps
        ):
            raise UserError(
                f"checkpoint.milestone_every_n_steps must be a multiple of checkpoint.every_n_steps {every_n_steps}, "
                f"got {milestone_every_n_steps}"
            )
        _refuse_remote(dirpath)
        super().__init__(
            dirpath=dirpath,
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            save_last=None,  # the link is ours: Lightning removes it before it makes the new one
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
        )
        self.milestone_every_n_steps = milestone_every_n_steps
        self.asynchronous = asynchronous
        self.verify = verify
        self._jobs = _Jobs(in_thread=False)
        self.last_saved: str | None = None
        """The newest whole checkpoint that this run wrote."""
        self._due: list[Callable[[], None]] = []
        """Jobs that wait until the step that was saved is logged and validated."""

    @property
    def state_key(self) -> str:
        return type(self).__name__  # Lightning's own names the options, and warns on a resume with others

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        _refuse_remote(self.dirpath)
        _use_folders(trainer.strategy)
        self._jobs = _Jobs(in_thread=self.asynchronous)
        self._ranks = Ranks(trainer, beside_training=self.asynchronous)
        if stage == "fit":
            self._ranks.do(self._make_folder)
        if isinstance(trainer.strategy, Sharded):
            trainer.strategy.saving_group = self._ranks.group
        elif self.asynchronous and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                f"checkpoint.asynchronous needs trainer.strategy meap_lit.parallel.strategies.Sharded, got "
                f"{type(trainer.strategy).__name__}, which saves between training steps only"
            )

    def _make_folder(self) -> None:
        """Make the folder before training, not at the first save."""
        assert self.dirpath is not None
        try:
            os.makedirs(self.dirpath, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder of checkpoints {self.dirpath}: {error.strerror}; name another as "
                f"checkpoint.dirpath"
            ) from error

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["dirpath"] == self.dirpath:  # a resume in a new folder does not manage the old one
            super().load_state_dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_global_step_saved = trainer.global_step  # the checkpoint that this run resumes from

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._jobs.check()
        super().on_train_batch_end(trainer, *args, **kwargs)
        if trainer.global_step == trainer.max_steps:
            # not at the end of training: Lightning counts a step twice where a run continues from there
            self._take_state(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._start_due(trainer)

    def _start_due(self, trainer: L.Trainer) -> None:
        """Write what was logged so far, then start the jobs that waited for it."""
        due, self._due = self._due, []
        for logger in trainer.loggers if due else ():
            logger.save()
        for job in due:
            self._jobs.add(job)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._jobs.close()  # finish a checkpoint that is being written

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._jobs.close()

    def save(self, trainer: L.Trainer) -> None:
        """Save now, between two optimizer steps, unless that was just done, and wait until it is on the disk."""
        self._take_state(trainer)
        self._start_due(trainer)
        self._jobs.wait()

    def _take_state(self, trainer: L.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self._jobs.wait()
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
        if trainer.is_global_zero:  # before another rank can begin
            self._remove_leftovers(trainer)
        path, aside = map(Path, trainer.strategy.broadcast((filepath, _aside(Path(filepath)))))
        self._last_global_step_saved = trainer.global_step
        if self.asynchronous:  # the ranks of a node share its memory: no copy for those that write nothing
            writes = trainer.is_global_zero or isinstance(trainer.strategy, Sharded)
            checkpoint = on_host(checkpoint) if writes else {}
        self._due.append(partial(self._write, trainer, checkpoint, path, aside))

    def _write(self, trainer: L.Trainer, checkpoint: dict[str, Any], path: Path, aside: Path) -> None:
        ranks, is_first = self._ranks, trainer.is_global_zero
        try:
            ranks.do(lambda: trainer.strategy.save_checkpoint(checkpoint, aside))
            parts = ranks.do(lambda: checksums(aside, ranks.rank, ranks.number))
            found = {name: checksum for part in parts for name, checksum in part.items()}
            ranks.do(lambda: _publish(aside, path, found) if is_first else None)
        except BaseException as error:
            if is_first:
                _remove(aside)
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"cannot save checkpoint {path}: {error.strerror}; last good checkpoint: "
                f"{self.last_saved or trainer.ckpt_path or 'none was saved yet'}"
            ) from error
        self.last_saved = self._last_checkpoint_saved = str(path)
        for logger in trainer.loggers if is_first else ():
            logger.after_save_checkpoint(self)

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        every, step = self.milestone_every_n_steps, re.match(r"step=(\d+)", Path(previous).name)
        is_milestone = every is not None and step is not None and int(step[1]) % every == 0
        return not is_milestone and super()._should_remove_checkpoint(trainer, previous, current)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if trainer.is_global_zero:
            self._due.append(partial(_take_away, Path(filepath)))  # once the newer one is whole

    def _remove_leftovers(self, trainer: L.Trainer) -> None:
        """Remove what killed runs left here, where this run was resumed from, and in all versions of both.

        What a living run still writes in another folder stays. All versions are searched because a run that was killed
        before its first checkpoint is not the one that the next run resumes from.
        """
        assert self.dirpath is not None
        here = Path(self.dirpath)
        resumed_from = Path(trainer.ckpt_path).absolute().parent if trainer.ckpt_path else here
        for folder in (here, resumed_from):
            versions = folder.parent.parent.glob(f"version_*/{folder.name}/*{_ASIDE}*")
            for old in {*folder.glob(f"*{_ASIDE}*"), *versions}:
                if old.parent == here or _is_abandoned(old):
                    _remove(old)


def _aside(path: Path) -> str:
    return f"{path}{_ASIDE}{os.getpid()}@{socket.gethostname()}"


def _refuse_remote(dirpath: Any) -> None:
    if "://" in str(dirpath):
        raise UserError(f"checkpoint.dirpath must be a folder of this machine or its network, got {dirpath}")


def _is_abandoned(path: Path) -> bool:
    """Return whether the process that wrote it has ended; on another host, after a day of silence."""
    pid, _, host = path.name.rpartition(_ASIDE)[2].partition("@")
    if host == socket.gethostname() and pid.isdigit():
        return has_ended(int(pid))
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    return time.time() - max(file.lstat().st_mtime for file in files) > _SECONDS_PER_DAY


def _publish(aside: Path, path: Path, found: dict[str, Any]) -> None:
    """Give a written checkpoint its checksums and its name, and move the link `last.ckpt` to it."""
    seal(aside, found)
    os.rename(aside, path)
    link = Path(_aside(path.with_name(LAST)))
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, path.with_name(LAST))
    to_disk(path.parent)


def _take_away(path: Path) -> None:
    if path.exists():
        aside = Path(_aside(path))
        os.rename(path, aside)  # part of a folder must not look like a checkpoint
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


class _Jobs:
    """Do jobs one after the other, here or in a thread; after one that failed, start none."""

    def __init__(self, in_thread: bool) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if in_thread else None
        self._last: Future[None] | None = None

    def add(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            job()
        else:
            self._last = self._thread.submit(_do_after, self._last, job)

    def check(self) -> None:
        """Raise what a job has raised by now."""
        if self._last is not None and self._last.done():
            self._last.result()

    def wait(self) -> None:
        """Wait for all jobs, and raise what one raised."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait for all jobs, even if one fails, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown()


def _do_after(earlier: Future[None] | None, job: Callable[[], None]) -> None:
    if earlier is not None:
        earlier.result()  # raises what that one raised
    job()


def on_host(state: Any) -> Any:
    """Return a copy of a checkpoint's content in the host's memory; tensors that were one stay one."""
    copies: dict[Any, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(copy, value))
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", copy=True)
        return copies[id(value)]

    return copy(state)


class FolderIO(CheckpointIO):
    """Write and read checkpoints as folders, for Lightning's strategies, whose first rank writes the whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return StoredCheckpoint(Path(path)).read_all()

    def remove_checkpoint(self, path: Any) -> None:
        _remove(Path(path))


def _use_folders(strategy: Strategy) -> None:
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = FolderIO()


class VerifyCheckpoint(L.Callback):
    """Compare a checkpoint with its checksums before anything is loaded from it; one rank hashes each file.

    A checkpoint that was written without checksums passes with a note, unless it has code in it. Then `Budget` checks
    that the run can continue from it, before the model is built.

    Args:
        path: The checkpoint.
        hashes: Compare hashes; if not, sizes only.
    """

    def __init__(self, path: str, hashes: bool = True) -> None:
        self.path = Path(path)
        self.hashes = hashes

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        ranks = Ranks(trainer)
        paths = {str(path) for path in ranks.do(lambda: self.path)}
        if len(paths) > 1:
            raise UserError(f"--ckpt_path is {' on one rank and '.join(sorted(paths))} on another; name the checkpoint")
        _use_folders(trainer.strategy)
        ranks.do(lambda: self._check(ranks))
        if stage == "fit":
            ranks.do(partial(self._check_resume, trainer))

    def _check(self, ranks: Ranks) -> None:
        check(self.path, self.hashes, ranks.rank, ranks.number)
        if ranks.rank == 0:
            StoredCheckpoint(self.path).refuse_code()

    def _check_resume(self, trainer: L.Trainer) -> None:
        state = read_trainer_state(self.path)
        for callback in trainer.callbacks:
            if isinstance(callback, Budget):
                callback.check_resume(trainer, state, self.path)
