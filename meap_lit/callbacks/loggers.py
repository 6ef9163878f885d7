"""Where a run logs: its folder, and services that show curves, texts and figures."""

import html
import logging
import os
import re
import shlex
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from meap_lit.errors import UserError
from meap_lit.files import run_versions
from meap_lit.secrets import hide_in_words


class RunFolder(Logger):
    """Keep a run in the folder `SAVE_DIR/NAME/version_N`, as TensorBoardLogger does, and log nowhere else.

    The run itself writes there what every run writes: its recipe, tokenizer, checkpoints, figures, and all logged
    values as `curves.csv`.

    Args:
        save_dir: Folder of all runs.
        name: Name of the runs of this recipe.
        version: Number or name of the run; by default the number after the highest in the folder.
    """

    def __init__(self, save_dir: str, name: str, version: int | str | None = None) -> None:
        super().__init__()
        self._folder = os.path.expandvars(os.path.expanduser(save_dir))
        self._name = name
        self._version = version

    @property
    def save_dir(self) -> str:
        return self._folder

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        if self._version is None:
            taken = run_versions(Path(self.save_dir, self.name))
            self._version = int(taken[-1].name.removeprefix("version_")) + 1 if taken else 0
        return self._version

    @property
    def log_dir(self) -> str:
        return os.path.join(self.save_dir, self.name, version_folder(self.version))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write nothing: curves.csv holds them."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: config.yaml holds them."""


class Service(RunFolder):
    """A logger that also sends a run to a service, which knows it by an id.

    A checkpoint keeps the id, so a resumed run continues the run of the service, also in a new folder.

    Args:
        resume: Continue the service's run of the checkpoint that a run resumes from; false starts another.
    """

    package: str
    """The package of the service, and the extra that installs it."""

    def __init__(self, save_dir: str, name: str, version: int | str | None = None, resume: bool = True) -> None:
        if find_spec(self.package) is None:
            raise UserError(
                f"trainer.logger {type(self).__name__} needs the package {self.package}: "
                f"pip install 'meap-lit[{self.package}]'"
            )
        super().__init__(save_dir, name, version)
        self.resume = resume
        self.run_id: str | None = None
        """Id of the run in the service; None until it is opened."""

    @property
    @abstractmethod
    def experiment(self) -> Any:
        """The package's object for the run, which is opened at the first use."""

    @abstractmethod
    def add_text(self, tag: str, text: str, step: int) -> None:
        """Show a text, after `step` optimizer steps."""

    @abstractmethod
    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        """Show a figure of matplotlib, after `step` optimizer steps."""

    @abstractmethod
    def view(self) -> str | None:
        """Return a command that shows the run, or that uploads it; None if `address` is all that is needed."""

    @abstractmethod
    def address(self) -> str | None:
        """Return the address of the page that shows the run; None if it has none."""


class WandB(Service):
    """Log to Weights & Biases, or offline into the folder of the run.

    Args:
        project: Project; by default that of the environment (WANDB_PROJECT), or `meap_lit`.
        entity: User or team; by default that of the environment or of the login.
        group: Runs to show together; by default those of this recipe's name.
        tags: Labels of the run.
        notes: Description of the run.
        offline: Keep everything in the folder of the run, to be uploaded by `wandb sync`.
    """

    package = "wandb"

    def __init__(
        self,
        save_dir: str,
        name: str,
        version: int | str | None = None,
        resume: bool = True,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        offline: bool = False,
    ) -> None:
        super().__init__(save_dir, name, version, resume)
        self.offline = offline
        self._options: dict[str, Any] = {
            "project": project or os.environ.get("WANDB_PROJECT") or "meap_lit",
            "entity": entity,
            "group": group or name,
            "tags": tags,
            "notes": notes,
        }
        self._run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._run is None:
            import wandb

            os.makedirs(self.log_dir, exist_ok=True)
            with _command_without_secrets():
                self._run = wandb.init(
                    dir=self.log_dir,
                    name=f"{self.name}-{Path(self.log_dir).name}",
                    id=self.run_id,
                    resume="allow",
                    mode="offline" if self.offline else None,  # None leaves it to WANDB_MODE
                    **self._options,
                )
            self.run_id = self._run.id
            self._run.define_metric("*", step_metric="step", step_sync=True)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.experiment.config.update(params, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.experiment.log({**values_of(metrics), "step": step + 1})

    def add_text(self, tag: str, text: str, step: int) -> None:
        import wandb

        self.experiment.log({tag: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False), "step": step})

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        import wandb

        self.experiment.log({tag: wandb.Image(figure), "step": step})

    def view(self) -> str | None:
        run = self.experiment
        return shlex.join(["wandb", "sync", os.path.relpath(run.settings.sync_dir)]) if run.offline else None

    def address(self) -> str | None:
        return None if self.experiment.offline else self.experiment.url

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:  # otherwise a second run of this process would continue it
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run = None


class MLflow(Service):
    """Log to MLflow: to a tracking server, or to a database in a file.

    Args:
        tracking_uri: Address of the server or the database; by default that of the environment (MLFLOW_TRACKING_URI),
            or the file `mlflow.db` in save_dir.
        experiment: Name of the experiment; by default the name of this recipe's runs.
        tags: Labels of the run.
    """

    package = "mlflow"

    def __init__(
        self,
        save_dir: str,
        name: str,
        version: int | str | None = None,
        resume: bool = True,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        super().__init__(save_dir, name, version, resume)
        in_file = f"sqlite:///{self.save_dir}/mlflow.db"
        self.tracking_uri: str = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or in_file
        self._experiment_name = experiment or name
        self._tags = tags or {}
        self._client: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            for name in ("alembic", "mlflow"):
                logging.getLogger(name).setLevel(logging.WARNING)  # they log how they make the tables of a new database
            client = MlflowClient(self.tracking_uri)
            if self.run_id is None:
                run = client.create_run(
                    self._find_experiment(client), run_name=Path(self.log_dir).name, tags=self._tags
                )
                self.run_id = run.info.run_id
                self._is_new = True
            else:
                client.update_run(self.run_id, status="RUNNING")
                self._is_new = False
            self._client = client
        return self._client

    def _find_experiment(self, client: Any) -> str:
        """Return the id of the experiment, which is made if there is none."""
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None:
            return found.experiment_id
        # beside a database, files would go to ./mlruns
        has_no_files = self.tracking_uri.startswith(("sqlite", "postgresql", "mysql", "mssql"))
        here = Path(self.save_dir, "mlflow.artifacts").absolute().as_uri() if has_no_files else None
        return client.create_experiment(self._experiment_name, artifact_location=here)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        client = self.experiment
        if self._is_new:  # MLflow refuses to change a parameter, such as that of a larger budget
            flat = [Param(_mlflow_name(name), str(value)[:6000]) for name, value in _flatten(params)]
            for start in range(0, len(flat), 100):  # the most that MLflow takes at once
                client.log_batch(self.run_id, params=flat[start : start + 100])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(_mlflow_name(name), value, now, step + 1) for name, value in values_of(metrics).items()]
        self.experiment.log_batch(self.run_id, metrics=values)

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.experiment.log_text(self.run_id, text, f"{tag}/step_{step}.txt")

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.experiment.log_figure(self.run_id, figure, f"{tag}/step_{step}.png")

    def view(self) -> str | None:
        if self.address() is not None:
            return None
        from mlflow.version import VERSION

        # the package that logs has no pages
        return shlex.join(hide_in_words(["uvx", f"mlflow@{VERSION}", "ui", "--backend-store-uri", self.tracking_uri]))

    def address(self) -> str | None:
        if not self.tracking_uri.startswith("http"):
            return None
        experiment_id = self.experiment.get_run(self.run_id).info.experiment_id
        return f"{self.tracking_uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{self.run_id}"

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._client is not None:
            self._client.set_terminated(self.run_id, "FINISHED" if status == "success" else "FAILED")
            self._client = None


def run_folder(trainer: L.Trainer) -> str:
    """Return the folder of a run, `SAVE_DIR/NAME/VERSION` of the first logger; without loggers that of all runs."""
    if not trainer.loggers:
        return trainer.default_root_dir
    logger = trainer.loggers[0]
    if logger.log_dir is not None:
        return logger.log_dir
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version_folder(logger.version))


def version_folder(version: int | str | None) -> str:
    """Return the folder of a version, as Lightning's loggers name it."""
    return version if isinstance(version, str) else f"version_{version}"


def services(trainer: L.Trainer) -> list[Service]:
    """Return the loggers of a run that send it to a service."""
    return [logger for logger in trainer.loggers if isinstance(logger, Service)]


def writers(trainer: L.Trainer) -> list[Any]:
    """Return what shows texts (`add_text`) and figures (`add_figure`) of a run; none but on the first rank."""
    if not trainer.is_global_zero:
        return []
    boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [*boards, *services(trainer)]


def as_code(text: str) -> str:
    """Return Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def values_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the values that Lightning logs after a step, without the epoch that it adds, which is always 0.

    Lightning numbers them by the steps before this one.
    """
    return {name: value for name, value in metrics.items() if name != "epoch"}


@contextmanager
def _command_without_secrets() -> Iterator[None]:
    """Show secrets of the command line as `***`: W&B uploads the words of the command."""
    words = sys.argv
    sys.argv = hide_in_words(words)
    try:
        yield
    finally:
        sys.argv = words


def _flatten(values: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, each with its keys joined by dots."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _flatten(value, f"{where}.{name}".removeprefix("."))
    else:
        yield where.replace(".init_args", ""), values


def _mlflow_name(name: str) -> str:
    """Return a name with the characters that MLflow allows, of at most its 250, without an empty part of a path."""
    return re.sub(r"[^\w. /-]", "_", name).replace("//", "/").strip("/")[-250:]
