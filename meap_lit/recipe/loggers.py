"""The loggers of a recipe: their options and folders, and when a run opens them."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.loggers.logger import Logger

from meap_lit.callbacks.loggers import Service, run_folder, services, version_folder
from meap_lit.checkpoint.folder import StoredCheckpoint
from meap_lit.errors import NO_SPACE, UserError, in_one_line
from meap_lit.secrets import hide_in_text


class RunTrainer(L.Trainer):
    """A Trainer whose `log_dir` is the folder of the run with every logger; Lightning knows it for two of its own."""

    @property
    def log_dir(self) -> str:
        return self.strategy.broadcast(run_folder(self))


class OpenLoggers(L.Callback):
    """Open the Trainer's loggers, which make the folder of a run, once the run is known to train something.

    Lightning would open them before the data is read. Commands other than `fit` print their results and log nothing,
    so that no folder looks like a run.

    A checkpoint holds the ids of the run in the services that it is sent to, by which a resumed run continues there.

    Args:
        checkpoint: The checkpoint from which the run resumes, if any.
    """

    def __init__(self, checkpoint: str | None) -> None:
        self._checkpoint = None if checkpoint == "best" else checkpoint
        self._made: str | None = None

    def hold_back(self, trainer: L.Trainer) -> None:
        """Take the loggers from a new Trainer."""
        self._loggers, trainer.loggers = trainer.loggers, []
        self._profiles = trainer.profiler.dirpath

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        trainer.loggers = self._loggers
        if trainer.is_global_zero and trainer.loggers:
            self._make_folder(trainer)
        trainer.profiler.dirpath = self._profiles  # its first setup had no folder of the run
        trainer.profiler.setup(stage, trainer.local_rank, trainer.log_dir)
        ids: dict[str, str] = {}
        if self._checkpoint is not None and any(service.resume for service in services(trainer)):
            ids = StoredCheckpoint(Path(self._checkpoint)).trainer_state.get("services", {})
        for service in services(trainer):
            if service.resume:
                service.run_id = ids.get(type(service).__name__)

    def _make_folder(self, trainer: L.Trainer) -> None:
        """Number a new run and make its folder, one process at a time: runs that start together must not share one."""
        folder_of_runs = trainer.loggers[0].save_dir or trainer.default_root_dir
        os.makedirs(folder_of_runs, exist_ok=True)
        above = os.open(folder_of_runs, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(above, fcntl.LOCK_EX)
            for logger in trainer.loggers:
                _ = logger.version  # all of them before one makes the folder of this run
            folder = run_folder(trainer)
            if not os.path.exists(folder):
                os.makedirs(folder)
                self._made = folder
        finally:
            os.close(above)  # and unlocks it

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no empty folder of a run that did not begin."""
        if self._made is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._made)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if ids := {type(service).__name__: service.run_id for service in services(trainer)}:
            checkpoint["services"] = ids


def log_recipe(logger: Logger, recipe: dict[str, Any]) -> None:
    """Log the values of a recipe, which opens the logger.

    Raises:
        UserError: If a service cannot be reached, or refuses.
    """
    try:
        logger.log_hyperparams(recipe)
    except Exception as error:
        if isinstance(error, UserError) or getattr(error, "errno", None) in NO_SPACE:
            raise
        reason = hide_in_text(in_one_line(error))
        is_resumed = isinstance(logger, Service) and logger.run_id is not None
        hint = f" (run {logger.run_id}; --trainer.logger.resume false starts another)" if is_resumed else ""
        raise UserError(f"trainer.logger {type(logger).__name__} cannot be opened: {reason}{hint}") from error


def options_of_loggers(config: Namespace) -> list[Namespace]:
    """Return the options of each logger of a recipe."""
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    return [getattr(logger, "init_args", None) or Namespace() for logger in loggers]


def expand_folders(config: Namespace) -> None:
    """Replace `~` and `$NAME` in the folders that a run writes.

    Lightning's TensorBoardLogger writes into the expanded folder, but looks for earlier runs in the other; CSVLogger
    does not expand it.
    """
    for options in options_of_loggers(config):
        if options.get("save_dir"):
            options.save_dir = os.path.expandvars(os.path.expanduser(options.save_dir))
    if config.checkpoint.dirpath is not None:
        config.checkpoint.dirpath = os.path.expandvars(os.path.expanduser(config.checkpoint.dirpath))


def runs_of(config: Namespace) -> Path:
    """Return the folder of earlier runs of a recipe: `checkpoint.dirpath`, or the logger's folder.

    A logger whose `version` is set in the recipe has only that run.
    """
    if config.checkpoint.dirpath is not None:
        return Path(config.checkpoint.dirpath)
    options = next(iter(options_of_loggers(config)), Namespace())
    if not options.get("save_dir") or not options.get("name"):
        raise UserError("--ckpt_path last needs a trainer.logger with save_dir and name; name a run's folder instead")
    return fixed_folder(options) or Path(options.save_dir, options.name)


def fixed_folder(logger: Namespace) -> Path | None:
    """Return the folder of a run by the options of its logger; None if each run gets a folder of its own."""
    version = logger.get("version")
    if version is None or not logger.get("save_dir"):
        return None
    return Path(logger.save_dir, logger.get("name") or "", version_folder(version))


def make_log_folder(options: Namespace) -> None:
    """Make the folder of a logger, before any data is prepared; refuse an address, and checkpoints for a service."""
    if options.get("log_model"):
        raise UserError(
            f"trainer.logger.log_model {options.log_model} is refused: checkpoints stay in the run's folder; leave it "
            f"out, and upload a model with export --push"
        )
    if not options.get("save_dir"):
        return
    key, folder = "trainer.logger.save_dir", Path(options.save_dir)
    if "://" in options.save_dir:
        raise UserError(
            f"{key} must be a folder of this machine or its network, got {options.save_dir}; name one, such as runs, "
            f"and copy it there when the run has ended"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder of logs {folder}: {error.strerror}; name another as {key}") from error
    of_name = folder / (options.get("name") or "")
    if not os.access(of_name if of_name.is_dir() else folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the folder of logs {folder}; name another as {key}")
