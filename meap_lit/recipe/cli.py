"""A recipe: one YAML file that composes model, data, mask schedule and trainer into a run."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from meap_lit.callbacks import (
    Budget,
    Checkpoint,
    RetrievalProbe,
    RunSummary,
    StepProgressBar,
    StopOnHang,
    StopOnNonFiniteLoss,
    Throughput,
)
from meap_lit.callbacks.budget import TimeLimit, check_trainer
from meap_lit.callbacks.checkpoint import VerifyCheckpoint
from meap_lit.callbacks.mixture import Mixture
from meap_lit.callbacks.stopping import StopOnSignal
from meap_lit.checkpoint.find import find_checkpoint
from meap_lit.data.datamodule import StreamingData
from meap_lit.errors import NO_SPACE, UserError
from meap_lit.modules import MEAPFineTuning, MEAPPretraining
from meap_lit.modules.cpu_memory import keep_freed_memory
from meap_lit.parallel.strategies import follow_launcher
from meap_lit.recipe.explain import check_values, explain, find_user_error, input_errors, raised_by
from meap_lit.recipe.file import KeepsSecrets, RecipeFile, current_words

# `--budget.max_step` is a mistake, not short for `--budget.max_steps`
PARSER = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}

CALLBACKS = {"budget": Budget, "checkpoint": Checkpoint, "probe": RetrievalProbe, "hang": StopOnHang}
"""Those that a recipe gives options to, under a top-level key of its own."""

GROUPS = {"trainer": L.Trainer, **CALLBACKS}
"""The classes that take the values of a top-level key without a class_path."""

MODULES = {"text": MEAPPretraining, "chat": MEAPFineTuning}
"""What trains on datasets of each kind."""


class RecipeParser(KeepsSecrets, LightningArgumentParser):
    """A parser of recipes."""


class RecipeCLI(LightningCLI):
    """LightningCLI with the parts that every run of this project has.

    A recipe's top-level keys: `model`, `data`, `trainer` as Lightning knows them; those of `CALLBACKS`;
    `seed_everything`; and `base`, a recipe that this one starts from.
    """

    @classmethod
    def run(cls, arguments: list[str]) -> "RecipeCLI":
        """Parse and run one command.

        Raises:
            UserError: If the recipe or an override is wrong, in one line.
        """
        # `${...}` is resolved after all files and overrides are read, so it follows an override
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        try:
            return cls(
                args=arguments,
                save_config_callback=SaveRecipe,
                trainer_defaults={
                    "max_epochs": 1,
                    "num_sanity_val_steps": 0,
                    "use_distributed_sampler": False,
                    "log_every_n_steps": 10,
                    "enable_model_summary": False,
                },
                parser_kwargs={**PARSER, **{name: PARSER.copy() for name in cls.subcommands()}},
                auto_configure_optimizers=False,
                subclass_mode_model=True,
                subclass_mode_data=True,
                model_class=L.LightningModule,
                datamodule_class=L.LightningDataModule,
            )
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            if (wrong := _as_user_error(error)) is error:
                raise  # from what it was raised from
            raise wrong from error

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = RecipeParser(dump_header=[], **kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="Recipe; a later one overrides an earlier one.")
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        usage = f"python -m meap_lit {subcommand} --config RECIPE [--config OVERLAY ...] [--KEY VALUE ...]"
        epilog = (
            "Options of a class: --model.help meap_lit.modules.MEAPPretraining, "
            "--data.help meap_lit.data.pretraining.PretrainingData"
        )
        return super()._prepare_subcommand_parser(klass, subcommand, usage=usage, epilog=epilog, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--base", type=str | None, default=None, help="Recipe that this one starts from, relative to its folder."
        )
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"seed_everything": 0})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        words = _nest_nulls(current_words(args))
        unprinted = [word for word in words if word.partition("=")[0] != "--print_config"]
        if any(word.partition("=")[0] in ("-c", "--config") for word in words) and unprinted != words:
            self.parse_arguments(parser, unprinted)  # jsonargparse prints before the values could be checked
        with input_errors(groups=GROUPS):
            self.config = parser.parse_args(words)
        check_values(self.config[self.config.subcommand].as_dict(), GROUPS)

    def _parse_ckpt_path(self) -> None:
        """The recipe says what is run; Lightning would let a checkpoint's hyper-parameters override it."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        if self.subcommand == "fit":
            check_trainer(config)
        opening = OpenLoggers()
        callbacks = [*callbacks, Throughput(), Mixture(), StopOnNonFiniteLoss(), RunSummary(), StopOnSignal()]
        given = self.config[self.subcommand]
        if given.ckpt_path not in (None, "best"):
            callbacks.append(VerifyCheckpoint(given.ckpt_path, hashes=given.checkpoint.verify))
        callbacks.append(opening)
        if config["enable_progress_bar"] is not False:
            callbacks.append(StepProgressBar())
        if config["enable_checkpointing"] is False:  # Lightning refuses the callback then
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        follow_launcher(config)
        config["default_root_dir"] = config["default_root_dir"] or "runs"
        if given.ckpt_path is None:
            _refuse_requeued(Path(config["default_root_dir"]))
        try:
            if config["max_time"] is not None:
                callbacks.append(TimeLimit(config.pop("max_time")))
            trainer = super()._instantiate_trainer(config, callbacks)
        except UserError:
            raise
        except (TypeError, ValueError) as error:  # what Lightning says of its own arguments
            raise UserError(f"trainer: {error}") from error
        opening.hold_back(trainer)
        # those that find that there is nothing to train come before those that need a logger
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, (Budget, VerifyCheckpoint, OpenLoggers)))
        return trainer

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.base = None  # it is part of the resolved recipe now
        if config.weights_only is False:
            raise UserError("weights_only false would run code from a checkpoint, which is never done; leave it out")
        config.weights_only = True
        config.ckpt_path = _resolve_checkpoint(config, starts_anew=self.subcommand == "fit")

    def instantiate_classes(self) -> None:
        for options in _options_of_loggers(self.config[self.subcommand]) if self.subcommand == "fit" else ():
            _make_log_folder(options)
        with input_errors(groups=GROUPS):
            super().instantiate_classes()
        _check_pair(self.model, self.datamodule)
        if isinstance(self.trainer.accelerator, CPUAccelerator):
            keep_freed_memory()

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (OSError, RuntimeError) as error:  # Lightning's teardown may fail over the first
            full = next((cause for cause in _causes(error) if isinstance(cause, UserError | OSError)), None)
            if not isinstance(full, OSError) or full.errno not in NO_SPACE:
                raise
            saved = getattr(self.trainer.checkpoint_callback, "last_saved", None) or self.trainer.ckpt_path
            where = full.filename or next((logger.save_dir for logger in self.trainer.loggers), None) or "the disk"
            raise UserError(
                f"cannot write into {where}: {full.strerror}; free some space or name another folder, such as "
                f"trainer.logger.save_dir; last good checkpoint: {saved or 'none was saved yet'}"
            ) from error


def _nest_nulls(words: Sequence[str]) -> list[str]:
    """The words of a command, with `--model.decoder.vocab_size null` written as `--model.decoder={vocab_size: null}`.

    jsonargparse (4.53) hands a value on to a class within a class as text, in which null has become the word None.
    """
    nested: list[str] = []
    for word in words:
        starts = word.startswith("--")
        option, _, value = word.partition("=") if starts else (nested[-1] if nested else "", "", word)
        group, *keys = option.replace(".init_args", "").split(".")
        if group in ("--model", "--data") and len(keys) > 1 and re.search(r"\bnull\b", value):
            if not starts:
                nested.pop()
            for key in reversed(keys[1:]):
                value = f"{{{key}: {value}}}"
            word = f"{group}.{keys[0]}={value}"
        nested.append(word)
    return nested


def _resolve_checkpoint(config: Namespace, *, starts_anew: bool) -> str | None:
    """The checkpoint that `--ckpt_path` stands for: `last` and the folder of a run for the newest whole one in it.

    With `starts_anew`, `last` is none before the first checkpoint, so that one command starts a run and resumes it.

    Raises:
        UserError: If there is none.
    """
    path = config.ckpt_path
    if path in (None, "best"):
        return path
    if "://" in path:
        raise UserError(f"--ckpt_path {path} is an address, which cannot be verified; copy the checkpoint here first")
    given = _runs_of(config) if path == "last" else Path(path)
    if path == "last" and starts_anew and not any(given.rglob("step=*.ckpt")):
        if rank_zero_only.rank == 0:
            print(f"checkpoint: none yet in {given}, the run starts anew")
        return None
    found = find_checkpoint(given, "--ckpt_path last" if path == "last" else "--ckpt_path")
    if found != given and rank_zero_only.rank == 0:
        print(f"checkpoint: {found}")
    return str(found)


def _refuse_requeued(folder: Path) -> None:
    """Raise `UserError` if a run without a checkpoint would start from one that Lightning saved in `folder`.

    On SLURM Lightning looks for what its requeueing saved, whichever run that was, in `trainer.default_root_dir`. That
    is the current folder, unless a recipe says otherwise; here it is `runs`, into which nothing was ever saved so.
    """
    found = next(iter(sorted(folder.glob("*hpc_ckpt_*"))), None)
    if found is not None and SLURMEnvironment.detect():
        raise UserError(
            f"Lightning would start this run from {found}, which another saved; remove it, or resume from it with "
            f"--ckpt_path {found}"
        )


def _runs_of(config: Namespace) -> Path:
    """The folder that holds what earlier runs of a recipe saved: `checkpoint.dirpath`, or the logger's name.

    A logger with a `version` of the recipe's own, such as the seed, has that one run.
    """
    if config.checkpoint.dirpath is not None:
        return Path(config.checkpoint.dirpath)
    options = next(iter(_options_of_loggers(config)), Namespace())
    save_dir, name, version = options.get("save_dir"), options.get("name"), options.get("version")
    if not save_dir or not name:
        raise UserError("--ckpt_path last needs a trainer.logger with save_dir and name; name a run's folder instead")
    return Path(save_dir, name) if version is None else Path(save_dir, name, _version_folder(version))


def _version_folder(version: int | str) -> str:
    """The folder of a run as Lightning's loggers name it."""
    return version if isinstance(version, str) else f"version_{version}"


def _options_of_loggers(config: Namespace) -> list[Namespace]:
    """What a recipe gives to each of its loggers."""
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    return [getattr(logger, "init_args", None) or Namespace() for logger in loggers]


def _make_log_folder(options: Namespace) -> None:
    """Make the folder that a logger writes into, before any data is prepared.

    Raises:
        UserError: If it is an address, or nothing can be written there.
    """
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


def _check_pair(model: L.LightningModule, data: L.LightningDataModule | None) -> None:
    """Raise `UserError` if the model or the data is none of ours, or they do not fit, before any data is prepared."""
    for key, value, fits, example in (
        ("model", model, type(model) is not L.LightningModule, "meap_lit.modules.MEAPPretraining"),
        ("data", data, isinstance(data, StreamingData), "meap_lit.data.pretraining.PretrainingData"),
    ):
        if not fits:
            given = "nothing" if value is None else type(value).__name__
            raise UserError(f"{key}.class_path must name a class of this project, such as {example}, got {given}")
    fitting = MODULES.get(getattr(data, "kind", ""))
    if fitting is not None and not isinstance(model, fitting) and isinstance(model, tuple(MODULES.values())):
        raise UserError(
            f"model.class_path {type(model).__name__} does not train on the rows of data.class_path "
            f"{type(data).__name__}; set model.class_path to meap_lit.modules.{fitting.__name__}, or change the data"
        )


def _as_user_error(error: Exception) -> Exception:
    """Return what the user should read of an error that Lightning wrapped; a bug of ours stays as it is."""
    if (wrong := find_user_error(error)) is not None:
        return wrong
    if isinstance(error, MisconfigurationException):
        return UserError(explain(str(error), groups=GROUPS))
    if died := re.match(r"DataLoader worker \((pid.*?)\) (.*)", str(error)):
        return UserError(
            f"a worker that reads data ({died[1]}) {died[2].strip(' .')}: most often memory ran out; free some or "
            f"lower data.num_workers (0 reads within the training), then resume with --ckpt_path last"
        )
    if lost := re.search(r"Connection \w+ by peer( \[.*?\])?|remote process exit\w*", str(error)):
        return UserError(f"another process of this run is gone ({lost[0]}); what ended it is said there")
    if isinstance(error, ValueError) and raised_by(error, "lightning"):  # it checks some of its arguments only now
        return UserError(f"trainer: {error}")
    return error


class OpenLoggers(L.Callback):
    """Opens the Trainer's loggers, which make the folder of a run, once it is known that there is something to train.

    Lightning would open them before the data is looked at. Other commands than `fit` print what they find and log
    nothing, so that no folder looks like a run.
    """

    def hold_back(self, trainer: L.Trainer) -> None:
        """Take the loggers from a Trainer that was just made."""
        self._loggers, trainer.loggers = trainer.loggers, []
        self._profiles = trainer.profiler.dirpath

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.loggers = self._loggers
            trainer.profiler.dirpath = self._profiles  # it was set up without the folder of the run
            trainer.profiler.setup(stage, trainer.local_rank, trainer.log_dir)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised for, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


class SaveRecipe(SaveConfigCallback):
    """Keeps the resolved recipe and the tokenizer beside the checkpoints, and shows the recipe in TensorBoard."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "overwrite": True})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.loggers:  # without one, the log folder is the current one
            super().setup(trainer, pl_module, stage)
            log_dir = trainer.log_dir  # asked of every rank, since Lightning broadcasts it
            if trainer.is_global_zero and log_dir is not None:
                trainer.datamodule.tokenizer.save(Path(log_dir, "tokenizer"))

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        recipe = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(recipe))
            if isinstance(logger, TensorBoardLogger):
                text = "\n".join(f"    {line}" for line in recipe.splitlines())  # shown as code
                logger.experiment.add_text("recipe", text)
