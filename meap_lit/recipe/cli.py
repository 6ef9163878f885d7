"""Commands on a recipe, which composes model, data, mask schedule and trainer into a run."""

import atexit
import inspect
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning as L
import torch
import yaml
from jsonargparse import Namespace, register_unresolvable_import_paths
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from meap_lit import hub
from meap_lit.callbacks import (
    Budget,
    Checkpoint,
    RetrievalProbe,
    RunSummary,
    Samples,
    StepProgressBar,
    StopOnHang,
    StopOnNonFiniteLoss,
    Throughput,
)
from meap_lit.callbacks.budget import TimeLimit, check_trainer
from meap_lit.callbacks.checkpoint import VerifyCheckpoint
from meap_lit.callbacks.garbage import CollectGarbage
from meap_lit.callbacks.loggers import as_code, writers
from meap_lit.callbacks.mixture import Mixture
from meap_lit.callbacks.stopping import StopOnSignal
from meap_lit.checkpoint.find import find_checkpoint
from meap_lit.checkpoint.folder import StoredCheckpoint
from meap_lit.data.datamodule import StreamingData
from meap_lit.data.finetuning import FineTuningData
from meap_lit.data.pretraining import PretrainingData
from meap_lit.errors import NO_SPACE, UserError, fix_of_disk
from meap_lit.files import write_file
from meap_lit.modules import MEAPFineTuning, MEAPPretraining
from meap_lit.modules.cpu_memory import keep_freed_memory
from meap_lit.parallel.strategies import Sharded, follow_launcher
from meap_lit.recipe.changes import changes_since
from meap_lit.recipe.explain import Known, causes, check_values, explain, find_user_error, input_errors, raised_by
from meap_lit.recipe.file import recipe_words
from meap_lit.recipe.help import help_page
from meap_lit.recipe.loggers import (
    OpenLoggers,
    RunTrainer,
    expand_folders,
    fixed_folder,
    log_recipe,
    make_log_folder,
    options_of_loggers,
    runs_of,
)
from meap_lit.recipe.parser import Parser, add_recipe_option, import_choices

register_unresolvable_import_paths(torch)  # functions that do not know their module: pytorch/pytorch#74483

CALLBACKS: dict[str, type] = {
    **{"budget": Budget, "checkpoint": Checkpoint, "probe": RetrievalProbe, "samples": Samples, "hang": StopOnHang}
}
"""Callbacks whose options are under a top-level key of the recipe."""

MODULES = {"text": MEAPPretraining, "chat": MEAPFineTuning}
"""The module that trains on datasets of each kind."""

CLASSES = {"model": tuple(MODULES.values()), "data": (PretrainingData, FineTuningData)}
"""The classes that a recipe names under each key; help and suggestions know their options."""

KEYS: Known = {
    **{**CLASSES, **CALLBACKS, "trainer": L.Trainer},
    **{"seed_everything": None, "base": None, "ckpt_path": None},
}
"""The top-level keys of a recipe."""

RUNS = "runs"
"""Folder for the files of a run without loggers."""

SHORT = {"--devices": "--trainer.devices", "--nodes": "--trainer.num_nodes"}
"""Short spellings of options. They win over every recipe, wherever they are among the words."""

DESCRIPTIONS = {
    "fit": "Train the model of a recipe.",
    "validate": "Print the clean validation loss of a checkpoint.",
}
"""The methods of the Trainer that are commands."""


class RecipeCLI:
    """One command on a recipe: read it, build its objects, run a method of the Trainer.

    A recipe's top-level keys: `model` and `data`, classes with their `init_args`; `trainer`, the arguments of
    Lightning's Trainer; those of `CALLBACKS`; `seed_everything`; and `base`, a recipe that this one starts from.

    Args:
        command: One of `DESCRIPTIONS`.
        words: What follows it on the command line.
    """

    keys: ClassVar[Known] = KEYS
    """The top-level keys that the command takes."""

    model: L.LightningModule
    datamodule: L.LightningDataModule | None
    trainer: L.Trainer

    def __init__(self, command: str, words: Sequence[str]) -> None:
        self.command = command
        self.parser = self.make_parser()
        self._add_trainer(self.parser)
        if {"-h", "--help"} & {*words}:
            print(help_page(self.parser, CLASSES), end="")
            raise SystemExit(0)
        self.config = self.parse(recipe_words(_long_words(words)))

    @classmethod
    def run(cls, arguments: list[str]) -> Self:
        """Run the command that the first of the arguments names.

        Raises:
            UserError: If the recipe or an override is wrong, in one line.
        """
        try:
            cli = cls(arguments[0], arguments[1:])
            cli.build()
            cli.start()
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            if (wrong := _as_user_error(error)) is error:
                raise  # from what it was raised from
            raise wrong from error
        return cli

    def make_parser(self) -> Parser:
        """Return the parser of the command."""
        prog = f"python -m meap_lit {self.command}"
        parser = Parser(
            prog=prog,
            usage=f"{prog} --config RECIPE [--config OVERLAY ...] [--devices N] [--KEY VALUE ...]",
            description=DESCRIPTIONS[self.command],
        )
        add_recipe_option(parser)
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint, or the folder of a run for its newest checkpoint. `last` is the newest checkpoint of the "
            "runs of this recipe; with `fit`, a new run starts where there is none.",
        )
        parser.add_argument(
            "--weights_only", type=bool | None, default=None, help="A checkpoint never runs code; false is refused."
        )
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of weights, order and masks.")
        parser.add_argument(
            "--base", type=str | None, default=None, help="Recipe that this one starts from, relative to its folder."
        )
        import_choices("meap_lit.data")
        # data is built first: the model's context often refers to data.seq_len, which is the one to name if it is wrong
        parser.add_subclass_arguments(L.LightningDataModule, "data", fail_untyped=False, required=True)
        parser.add_subclass_arguments(L.LightningModule, "model", fail_untyped=False, required=True)
        for key, callback in CALLBACKS.items():
            parser.add_class_arguments(callback, key, fail_untyped=False, sub_configs=True)
        parser.off = {key: callback.off for key, callback in CALLBACKS.items() if hasattr(callback, "off")}
        return parser

    def _add_trainer(self, parser: Parser) -> None:
        """Add the arguments of the Trainer and of its method that the command calls, after all others."""
        method = inspect.signature(getattr(L.Trainer, self.command)).parameters
        given = {name for name in method if name in ("self", "model", "datamodule") or name.endswith("dataloaders")}
        self._arguments = parser.add_method_arguments(
            L.Trainer, self.command, as_group=False, skip={*given, "ckpt_path", "weights_only"} - {"self"}
        )
        parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, fail_untyped=False, sub_configs=True)
        parser.set_defaults(
            {
                "trainer.max_epochs": 1,
                "trainer.num_sanity_val_steps": 0,
                "trainer.use_distributed_sampler": False,
                "trainer.log_every_n_steps": 10,
                "trainer.enable_model_summary": False,
            }
        )

    def parse(self, words: list[str]) -> Namespace:
        """Return the values that the words give to the keys of a recipe.

        Raises:
            UserError: If a recipe or an override is wrong.
        """
        unprinted = [word for word in words if word.partition("=")[0] != "--print_config"]
        if any(word.partition("=")[0] in ("-c", "--config") for word in words) and unprinted != words:
            self.parse(unprinted)  # jsonargparse prints before the values could be checked
        with input_errors(self.keys):
            config = self.parser.parse_args(words)
        check_values(config.as_dict(), self.keys)
        return config

    def build(self) -> None:
        """Build the model, the data and the Trainer.

        Raises:
            UserError: If a value is wrong, or the parts do not fit.
        """
        config = self.config
        L.seed_everything(config.seed_everything, workers=True)
        config.base = None  # it is part of the resolved recipe now
        if config.weights_only is False:
            raise UserError("weights_only false would run code from a checkpoint, which is never done; leave it out")
        config.weights_only = True
        if self.command == "validate" and config.ckpt_path is None and not config.model.init_args.get("init_from"):
            raise UserError("the weights of this recipe are random; name a checkpoint with --ckpt_path, such as last")
        expand_folders(config)
        self._resumes_newest = config.ckpt_path == "last"
        config.ckpt_path = _resolve_checkpoint(config, starts_anew=self.command == "fit")
        if config.ckpt_path not in (None, "best") and any(hub.is_hub_id(name) for _, name in _hub_names(config)):
            # the revisions with which the run of the checkpoint began
            hub.remember(StoredCheckpoint(Path(config.ckpt_path)).trainer_state.get("hub", {}))
        if self.command == "fit" and config.ckpt_path not in (None, "best"):
            self._name_changes(Path(config.ckpt_path))
        if self.command == "fit":
            if config.ckpt_path is None:
                _refuse_folder_of_another(config)
            for options in options_of_loggers(config):
                make_log_folder(options)
        with input_errors(KEYS):
            built = self.parser.instantiate(config)
            self.model, self.datamodule = built.model, built.data
            self.trainer = self.make_trainer(dict(vars(built.trainer)), [built[key] for key in CALLBACKS])
        check_pair(self.model, self.datamodule)
        if isinstance(self.datamodule, StreamingData):
            self.datamodule.resumes = config.ckpt_path is not None
        if isinstance(self.trainer.accelerator, CPUAccelerator):
            keep_freed_memory()

    @rank_zero_only
    def _name_changes(self, checkpoint: Path) -> None:
        """Print what the recipe changes in the run that it resumes; the user may have meant another run."""
        config = self.config.clone()
        for key, name in _hub_names(config):
            config[key] = hub.pinned(name)
        if changes := changes_since(checkpoint, yaml.safe_load(self.parser.dump(config, skip_none=False))):
            print(f"changed since the checkpoint was saved: {', '.join(changes)}")

    def make_trainer(self, options: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """Build the Trainer.

        Args:
            options: Its arguments. Callbacks among them come before all others.
            callbacks: The callbacks of `CALLBACKS`.

        Raises:
            UserError: If an argument is wrong, or contradicts the budget or the launcher.
        """
        if self.command == "fit":
            check_trainer(options)
        opening = OpenLoggers(self.config.ckpt_path)
        callbacks = [*callbacks, Throughput(), Mixture(), StopOnNonFiniteLoss(), RunSummary(), StopOnSignal()]
        callbacks.append(CollectGarbage())
        if self.config.ckpt_path not in (None, "best"):
            callbacks.append(VerifyCheckpoint(self.config.ckpt_path, hashes=self.config.checkpoint.verify))
        callbacks.append(opening)
        if options["enable_progress_bar"] is not False:
            callbacks.append(StepProgressBar())
        if options["enable_checkpointing"] is False:  # Lightning refuses the callback then
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        callbacks.append(SaveRecipe(self.parser, self.config))
        follow_launcher(options)
        for callback in callbacks:
            if isinstance(callback, Checkpoint):
                callback.resumes_newest = self._resumes_newest
        options["default_root_dir"] = options["default_root_dir"] or RUNS
        if self.config.ckpt_path is None:
            _refuse_requeued(Path(options["default_root_dir"]))
        if isinstance(options["strategy"], Sharded):
            # over NCCL Lightning would validate in inference mode, whose tensors FSDP2 could not write to in training
            options["inference_mode"] = False
        given = options["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        if other := next((callback for callback in given if isinstance(callback, LightningCheckpoint)), None):
            raise UserError(
                f"trainer.callbacks {type(other).__name__} would take the place of `checkpoint`, by which runs resume; "
                f"leave it out, and set checkpoint.every_n_steps, checkpoint.keep, checkpoint.milestone_every_n_steps"
            )
        try:
            if options["max_time"] is not None:
                callbacks.append(TimeLimit(options.pop("max_time")))
            options["callbacks"] = [*given, *callbacks]
            trainer = RunTrainer(**options)
        except UserError:
            raise
        except (TypeError, ValueError, MisconfigurationException) as error:  # from Lightning, about its own arguments
            raise UserError(f"trainer: {error}") from error
        opening.hold_back(trainer)
        trainer.callbacks.sort(key=_place)
        return trainer

    def start(self) -> None:
        """Run the command.

        Raises:
            UserError: If the disk is full.
        """
        try:
            self._start()
        except BaseException:
            # not now: Lightning kills this process when another one ends, and the error is not printed yet
            started = getattr(self.trainer.strategy.launcher, "procs", [])
            atexit.register(_end_ranks, [process for process in started if isinstance(process, subprocess.Popen)])
            raise

    def _start(self) -> None:
        arguments = {name: self.config[name] for name in ("ckpt_path", "weights_only", *self._arguments)}
        try:
            getattr(self.trainer, self.command)(self.model, datamodule=self.datamodule, **arguments)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning ends with the status of an error
                raise KeyboardInterrupt from None
            raise
        except (OSError, RuntimeError) as error:  # Lightning's teardown may fail after the first error
            full = next((cause for cause in causes(error) if isinstance(cause, UserError | OSError)), None)
            if not isinstance(full, OSError) or full.errno not in NO_SPACE:
                raise
            saved = getattr(self.trainer.checkpoint_callback, "last_saved", None) or self.trainer.ckpt_path
            where = full.filename or next((logger.save_dir for logger in self.trainer.loggers), None) or "the disk"
            raise UserError(
                f"cannot write into {where}: {full.strerror}; {fix_of_disk(full)}, such as "
                f"trainer.logger.save_dir; last good checkpoint: {saved or 'none was saved yet'}"
            ) from error


def _end_ranks(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that this process has started; on a GPU they would wait for it, in a collective, for minutes.

    Those that end by themselves, with a reason of their own, have a moment to say so.
    """
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    for process in processes:
        process.kill()  # nothing, if it has ended


def _long_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command with the options of `SHORT` spelled out, after all others."""
    others: list[str] = []
    spelled: list[str] = []
    taken = others
    for word in words:
        option, equals, value = word.partition("=")
        if word.startswith("--") or word == "-c":
            taken = spelled if option in SHORT else others
        taken.append(SHORT.get(option, option) + equals + value)
    return [*others, *spelled]


def _resolve_checkpoint(config: Namespace, *, starts_anew: bool) -> str | None:
    """Return the checkpoint that `--ckpt_path` names.

    `last` and the folder of a run name the newest whole checkpoint in it. With `starts_anew`, `last` is None before the
    first checkpoint, so that one command starts a run and resumes it.
    """
    path = config.ckpt_path
    if path in (None, "best"):
        return path
    if "://" in path:
        raise UserError(f"--ckpt_path {path} is an address, which cannot be verified; copy the checkpoint here first")
    given = runs_of(config) if path == "last" else Path(path)
    if path == "last" and starts_anew and not any(given.rglob("step=*.ckpt")):
        rank_zero_only(print)(f"checkpoint: none in {given} yet, so a new run starts")
        return None
    found = find_checkpoint(given, "--ckpt_path last" if path == "last" else "--ckpt_path")
    rank_zero_only(print)(f"checkpoint: {found}")  # also one that the recipe of a resumed run names
    return str(found)


def _refuse_folder_of_another(config: Namespace) -> None:
    """Raise `UserError` if a new run would replace files of an earlier one: its recipe, its curves, its checkpoints."""
    loggers = options_of_loggers(config)
    folders = {
        "checkpoint.dirpath": config.checkpoint.dirpath,
        "trainer.logger.version": fixed_folder(loggers[0]) if loggers else None,
    }
    if config.trainer.logger is False and config.trainer.enable_checkpointing is not False:
        folders["checkpoint.dirpath"] = (
            config.checkpoint.dirpath or f"{config.trainer.default_root_dir or RUNS}/checkpoints"
        )
    for key, folder in folders.items():
        names = ("step=*.ckpt", "checkpoints/step=*.ckpt", "summary.json")
        found = [file for name in names if folder is not None for file in sorted(Path(folder).glob(name))]
        if found:
            place = "last" if config.trainer.logger is not False else shlex.quote(str(folder))
            raise UserError(
                f"{folder} has an earlier run ({found[0].relative_to(folder)}), which a new one would replace; "
                f"continue it with --ckpt_path {place}, or name another folder as {key}"
            )


def _refuse_requeued(folder: Path) -> None:
    """Raise `UserError` if a run without a checkpoint would start from one that Lightning saved in `folder`.

    On SLURM Lightning looks for a checkpoint of its requeueing, of any run, in `trainer.default_root_dir`. Its default
    is the current folder; here it is `runs`, where Lightning saves no such checkpoint.
    """
    found = next(iter(sorted(folder.glob("*hpc_ckpt_*"))), None)
    if found is not None and SLURMEnvironment.detect():
        raise UserError(
            f"Lightning would start this run from {found}, which another run saved; remove it, or resume from it with "
            f"--ckpt_path {shlex.quote(str(found))}"
        )


def _hub_names(config: Namespace) -> list[tuple[str, str]]:
    """Return key and value of the options of a recipe that may be Hub ids, where they are set."""
    values = ((key, config.get(key)) for key in ("model.init_args.init_from", "data.init_args.tokenizer"))
    return [(key, value) for key, value in values if isinstance(value, str)]


def check_pair(model: L.LightningModule, data: L.LightningDataModule | None) -> None:
    """Raise `UserError` if model or data is not of this package, or they do not fit, before any data is prepared."""
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
    """Return the `UserError` for an error that comes from Lightning; a bug of this package stays as it is."""
    if (wrong := find_user_error(error)) is not None:
        return wrong
    if isinstance(error, MisconfigurationException):
        return UserError(explain(str(error), KEYS))
    # torch raises it wherever the main thread is; a logger would call it a wrong value
    found = (re.match(r"DataLoader worker \((pid.*?)\) (.*)", str(cause)) for cause in causes(error))
    if died := next(filter(None, found), None):
        return UserError(
            f"a worker that reads data ({died[1]}) {died[2].strip(' .')}: usually because memory ran out; free some or "
            f"lower data.num_workers (0 reads within the training), then resume with --ckpt_path last"
        )
    if lost := re.search(r"Connection \w+ by peer( \[.*?\])?|remote process exit\w*", str(error)):
        return UserError(f"another process of this run has ended ({lost[0]}); its own output has the reason")
    if isinstance(error, ValueError) and raised_by(error, "lightning"):  # it checks some arguments only now
        return UserError(f"trainer: {error}")
    # such as a metric that is not logged
    if isinstance(error, RuntimeError) and raised_by(error, "lightning.pytorch.callbacks"):
        return UserError(f"trainer.callbacks: {error}")
    return error


def _place(callback: L.Callback) -> int:
    """Return where a callback comes among all others.

    Those that may find nothing to train come first. `SaveRecipe` comes last: its first values replace the files of the
    folder, so `Checkpoint` must have locked it.
    """
    if isinstance(callback, (Budget, VerifyCheckpoint, OpenLoggers)):
        return 0
    return 2 if isinstance(callback, SaveRecipe) else 1


class SaveRecipe(L.Callback):
    """Log the resolved recipe, and write it and the tokenizer beside the checkpoints.

    A run that resumes in its own folder is built and restored first: a recipe that does not fit its checkpoint must not
    replace the one that does.
    """

    def __init__(self, parser: Parser, config: Namespace) -> None:
        self.parser = parser
        self.config = config
        self._recipe = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        for key, name in _hub_names(self.config):
            self.config[key] = hub.pinned(name)
        self._recipe = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            log_recipe(logger, yaml.safe_load(self._recipe))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self._recipe  # a resume in the same folder replaces that of the folder

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning's callbacks keep options in their states, as EarlyStopping its patience
        for callback in trainer.callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(state, dict) and type(callback).__module__.startswith("lightning."):
                for name in state.keys() & inspect.signature(type(callback)).parameters.keys():
                    state[name] = getattr(callback, name, state[name])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.loggers:  # the log folder is the current one
            return
        folder = Path(trainer.log_dir)  # called on every rank, since Lightning broadcasts it
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "config.yaml", self._recipe)
        for writer in writers(trainer):
            writer.add_text("recipe", as_code(self._recipe.rstrip()), 0)
        trainer.datamodule.tokenizer.save(folder / "tokenizer")
