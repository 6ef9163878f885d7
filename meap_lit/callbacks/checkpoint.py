"""Save checkpoints aside, whole, and rename them; refuse to resume from a damaged one."""

import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from meap_lit.callbacks.budget import Budget
from meap_lit.callbacks.loggers import run_folder
from meap_lit.checkpoint.checksums import check, checksums, compare_sizes, seal, to_disk
from meap_lit.checkpoint.find import LAST, age_of, newest_checkpoint
from meap_lit.checkpoint.folder import StoredCheckpoint, write
from meap_lit.errors import UserError, check_range
from meap_lit.files import hold, is_abandoned, is_partial, partial_path, release, remove
from meap_lit.modules.log_steps import ends_step
from meap_lit.parallel.ranks import Ranks
from meap_lit.parallel.strategies import Sharded


class Checkpoint(callbacks.Checkpoint):
    """Keep the last checkpoints of a run, always including the final step, and a link `last.ckpt` to the newest.

    All ranks write a checkpoint under another name; it gets its checksums, and takes its own name when it is whole.
    Then `last.ckpt` moves to it in one step, and only then is an old one removed. A kill at any moment leaves the
    previous checkpoint and nothing that could be taken for a new one. The next save of a run of the same recipe removes
    what it leaves aside.

    The state is taken at the end of a step. It is written when Lightning has logged that step and validated, before the
    next step, so that no value up to a checkpoint is missing from the logs. If one of several ranks fails in that
    validation, the checkpoint is lost, since the others cannot write it without that rank.

    A save needs memory on the host for what the rank writes, where the weights are on GPUs or `asynchronous` is set.
    With `asynchronous` a thread does the rest while training continues. A save that fails ends the run a little later,
    and a new save waits for the last.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: Number of checkpoints to keep; -1 keeps all.
        milestone_every_n_steps: Never remove checkpoints at multiples of this many steps.
        asynchronous: Write while training continues.
        dirpath: Folder; `checkpoints` inside the run's folder if not given.
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
        self.every_n_steps = every_n_steps
        self.save_top_k = keep  # as loggers call it
        self.milestone_every_n_steps = milestone_every_n_steps
        self.asynchronous = asynchronous
        self.dirpath = dirpath
        self.verify = verify
        self.best_model_path = ""
        """The newest checkpoint, under the name by which Lightning takes `--ckpt_path best`."""
        self.best_k_models: dict[str, int] = {}
        """Optimizer steps of the checkpoints that are kept, by path; the last may not be whole yet."""
        self._inherited: dict[str, int] = {}
        """The same of the checkpoint that this run resumes from, by name."""
        self._newest_inherited = ""
        self.last_saved: str | None = None
        """The newest whole checkpoint of this run."""
        self.resumes_newest = False
        """Whether `--ckpt_path last` selected the checkpoint, so that it must still be the newest."""
        self._step = 0
        """Optimizer step of the last save; no step, no checkpoint."""
        self._held: int | None = None
        """Descriptor of the folder, which is locked while the run lasts."""
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._due: Callable[[], None] | None = None
        """Writes the state that was taken, once its step is logged and validated."""
        self._state: dict[str, Any] = {}
        """What is due to be written; empty on a rank that writes nothing."""

    @property
    def state_key(self) -> str:
        return type(self).__name__  # Lightning's own names the options, and warns on a resume with others

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(self.dirpath or os.path.join(run_folder(trainer), "checkpoints"))
        _refuse_remote(self.dirpath)
        _use_folders(trainer.strategy)
        self._thread = _writing_thread(trainer.strategy.root_device) if self.asynchronous else None
        self._ranks = Ranks(trainer, beside_training=self.asynchronous)
        if stage == "fit":
            self._ranks.do(self._make_folder)
            if trainer.num_nodes > 1:
                self._check_shared(trainer)
        if isinstance(trainer.strategy, Sharded):
            trainer.strategy.saving_group = self._ranks.group
        elif self.asynchronous and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                f"checkpoint.asynchronous needs trainer.strategy meap_lit.parallel.strategies.Sharded, got "
                f"{type(trainer.strategy).__name__}, which saves between training steps only"
            )

    def _make_folder(self) -> None:
        """Make the folder before training, not at the first save, and lock it."""
        assert self.dirpath is not None
        try:
            os.makedirs(self.dirpath, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder of checkpoints {self.dirpath}: {error.strerror}; name another as "
                f"checkpoint.dirpath"
            ) from error
        try:
            self._held = hold(Path(self.dirpath)) if self._ranks.rank == 0 else None
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing its checkpoints into {self.dirpath}; wait until it ends, or name another "
                f"folder as checkpoint.dirpath or trainer.logger.version"
            ) from error
        last = Path(self.dirpath, LAST)
        if last.is_dir() and not last.is_symlink():
            raise UserError(f"{last} is a copy of a checkpoint, where a run sets a link to its last one; remove it")
        if os.listdir(self.dirpath):
            rank_zero_warn(f"Checkpoint directory {self.dirpath} exists and is not empty.")

    def _check_newest(self, trainer: L.Trainer) -> None:
        """Raise `UserError` if the folder has a newer checkpoint, for example one that another run saved meanwhile."""
        newest = newest_checkpoint(Path(self.dirpath or "")) if self._ranks.rank == 0 else None
        known = trainer.ckpt_path and Path(trainer.ckpt_path).resolve()
        if newest is not None and newest.resolve() != known:
            raise UserError(f"another run has just saved {newest}; repeat the command to resume from it")

    def _check_shared(self, trainer: L.Trainer) -> None:
        """Refuse a folder that the nodes do not share: a checkpoint would lack the files of all but the first node."""
        mark = trainer.strategy.broadcast(partial_path(Path(self.dirpath or "", "shared")))
        try:
            self._ranks.do(lambda: mark.touch() if trainer.is_global_zero else None)
            self._ranks.do(lambda: wait_for(mark))
        finally:
            if trainer.is_global_zero:
                mark.unlink(missing_ok=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the checkpoints of the run that this one continues; `on_train_start` says where they are.

        Only names are taken: a checkpoint of others could name any folder as one to be removed.
        """
        names = {Path(path).name: int(step) for path, step in state_dict["best_k_models"].items()}
        self._inherited = {name: step for name, step in names.items() if age_of(name) is not None}
        self._newest_inherited = Path(state_dict["best_model_path"]).name

    def state_dict(self) -> dict[str, Any]:
        names = ("dirpath", "best_k_models", "best_model_path")
        return {name: getattr(self, name) for name in names}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.resumes_newest:
            self._ranks.do(lambda: self._check_newest(trainer))
        self._step = trainer.global_step  # of the checkpoint that this run resumes from
        assert self.dirpath is not None
        here = Path(self.dirpath)
        # a resume in a new folder does not manage the old one
        if trainer.ckpt_path and Path(trainer.ckpt_path).resolve().parent == here.resolve():
            self.best_k_models = {str(here / name): step for name, step in self._inherited.items()}
            self.best_model_path = str(here / self._newest_inherited)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._writing is not None and self._writing.done():
            self._writing.result()  # raises what the thread raised
        # the last step is saved here too: Lightning numbers values wrongly where a run continues from a later state
        is_due = trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps
        if is_due and ends_step(trainer, batch_idx):
            self._save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._write_due(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # other ranks would wait for this one; a user error may mean that the weights are not finite
        try:
            if trainer.world_size == 1 and not isinstance(exception, UserError):
                self._write_due(trainer)
        finally:
            self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        """Finish a checkpoint that is being written, end the thread, and release the folder."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._held is not None:
            release(self._held)
            self._held = None

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def save(self, trainer: L.Trainer) -> None:
        """Save now, between two optimizer steps, unless that was just done, and wait until it is on the disk."""
        self._save(trainer)
        self._write_due(trainer)
        self._wait()

    def _write_due(self, trainer: L.Trainer) -> None:
        """Write what was logged so far, then the checkpoint that waited for it."""
        if self._due is None:
            return
        due, self._due = self._due, None
        checkpoint, self._state = self._state, {}
        for logger in trainer.loggers:
            logger.save()
        if checkpoint:
            # not what callbacks knew at the step's end: a resume does not repeat the validation that came after it
            states = {callback.state_key: state for callback in trainer.callbacks if (state := callback.state_dict())}
            checkpoint["callbacks"] = states if self._thread is None else on_host(states)
        if self._thread is None:
            due()
        else:
            self._writing = self._thread.submit(due)

    def _save(self, trainer: L.Trainer) -> None:
        """Save unless that was done after this step, and remove the oldest checkpoint when the new one is whole."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._wait()
        if trainer.is_global_zero:  # before another rank can begin
            self._remove_leftovers(trainer)
        path = self._free_name()
        path, aside = trainer.strategy.broadcast((path, partial_path(path)))
        old = sorted(self.best_k_models, key=lambda kept: self.best_k_models[kept])
        old = old[: max(0, len(old) + 1 - self.save_top_k)] if self.save_top_k > 0 else []
        removed = [Path(kept) for kept in old if self._may_remove(self.best_k_models.pop(kept), kept, trainer)]
        self.best_k_models[str(path)] = self._step  # a part of what is saved
        self.best_model_path = str(path)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint["saved"] = time.time()
        if self._thread is not None:  # the ranks of a node share its memory: no copy for those that write nothing
            if isinstance(trainer.strategy, Sharded):
                checkpoint = on_host(checkpoint, is_copy=trainer.strategy.parameter_device.type != "cpu")
            else:
                checkpoint = on_host(checkpoint) if trainer.is_global_zero else {}
        self._state = checkpoint
        self._due = partial(self._write, trainer, checkpoint, path, aside, removed)

    def _free_name(self) -> Path:
        """Return the path of a new checkpoint.

        A run that resumes in its own folder from an earlier checkpoint saves a step again, as `step=8-v1.ckpt`.
        """
        assert self.dirpath is not None
        versions = itertools.chain([""], (f"-v{number}" for number in itertools.count(1)))
        paths = (Path(self.dirpath, f"step={self._step}{version}.ckpt") for version in versions)
        return next(path for path in paths if not path.exists())

    def _may_remove(self, step: int, path: str, trainer: L.Trainer) -> bool:
        is_milestone = self.milestone_every_n_steps is not None and step % self.milestone_every_n_steps == 0
        is_resumed_from = trainer.ckpt_path and os.path.abspath(trainer.ckpt_path) == os.path.abspath(path)
        return not is_milestone and not is_resumed_from

    def _write(
        self, trainer: L.Trainer, checkpoint: dict[str, Any], path: Path, aside: Path, removed: Sequence[Path]
    ) -> None:
        """Write a checkpoint, and remove others when it is whole."""
        ranks, is_first = self._ranks, trainer.is_global_zero
        try:
            ranks.do(lambda: trainer.strategy.save_checkpoint(checkpoint, aside))
            parts = ranks.do(lambda: checksums(aside, ranks.rank, ranks.number))
            found = {name: checksum for part in parts for name, checksum in part.items()}
            ranks.do(lambda: _publish(aside, path, found) if is_first else None)
        except BaseException as error:
            if is_first:
                remove(aside)
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"cannot save checkpoint {path}: {error.strerror}; last good checkpoint: "
                f"{self.last_saved or trainer.ckpt_path or 'none was saved yet'}"
            ) from error
        self.last_saved = str(path)
        if is_first:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
            for old in removed:
                _take_away(old)

    def _remove_leftovers(self, trainer: L.Trainer) -> None:
        """Remove what killed runs left here, where this run was resumed from, and in all versions of both.

        What a living run still writes in another folder stays. All versions are searched because a run that was killed
        before its first checkpoint is not the one that the next run resumes from.
        """
        assert self.dirpath is not None
        here = Path(self.dirpath)
        resumed_from = Path(trainer.ckpt_path).absolute().parent if trainer.ckpt_path else here
        for folder in (here, resumed_from):
            versions = folder.parent.parent.glob(f"version_*/{folder.name}/*.partial-*")
            for old in {*folder.glob("*.partial-*"), *versions}:
                if old.parent == here and is_partial(old):
                    remove(old)
                elif is_abandoned(old):
                    with suppress(OSError):  # for example, a folder without write access
                        remove(old)


def _writing_thread(device: torch.device) -> ThreadPoolExecutor:
    """Return a thread that writes; on a GPU each thread begins with the first one of the node as its own."""
    on_gpu = device.type == "cuda"
    options: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (device,)} if on_gpu else {}
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint", **options)


def _refuse_remote(dirpath: Any) -> None:
    if "://" in str(dirpath):
        raise UserError(f"checkpoint.dirpath must be a folder of this machine or its network, got {dirpath}")


def _publish(aside: Path, path: Path, found: dict[str, Any]) -> None:
    """Give a written checkpoint its checksums and its name, and move the link `last.ckpt` to it."""
    try:
        compare_sizes(aside, found)
    except UserError as error:
        what = str(error).partition(";")[0]
        raise UserError(
            f"cannot save checkpoint {path}: {what}; it was changed or removed, or the nodes do not share the folder: "
            f"name a shared one as checkpoint.dirpath"
        ) from error
    seal(aside, found)
    os.rename(aside, path)
    link = partial_path(path.with_name(LAST))
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, path.with_name(LAST))
    to_disk(path.parent)


def wait_for(file: Path, seconds: float = 30.0) -> None:
    """Wait for a file that another node has made.

    Args:
        file: The file.
        seconds: Maximum time to wait, in seconds.

    Raises:
        UserError: If the file does not exist after `seconds` seconds.
    """
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"checkpoint.dirpath {file.parent} is another folder on node {platform.node()}; name one that they "
                f"share, or set trainer.logger.save_dir to one"
            )
        time.sleep(0.1)


def _take_away(path: Path) -> None:
    if path.exists():
        aside = partial_path(path)
        os.rename(path, aside)  # part of a folder must not look like a checkpoint
        remove(aside)


def on_host(state: Any, is_copy: bool = False) -> Any:
    """Return a copy of a checkpoint's content in the host's memory; tensors that were one stay one.

    Args:
        state: Mappings, lists, tensors and other values.
        is_copy: Weights and moments on the host were brought there for this checkpoint, so they are not copied again.
            Single numbers are: an optimizer may keep its own count of steps there.
    """
    copies: dict[Any, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(copy, value))
        if not isinstance(value, torch.Tensor) or (is_copy and value.device.type == "cpu" and value.dim() > 0):
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
        remove(Path(path))


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
        state = StoredCheckpoint(self.path).trainer_state
        for callback in trainer.callbacks:
            if isinstance(callback, Budget):
                callback.check_resume(trainer, state, self.path)
