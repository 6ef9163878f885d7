"""The budget of a run in tokens, steps or epochs, as the Trainer's steps, accumulation and validation interval."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Timer

from meap_lit.data.datamodule import StreamingData
from meap_lit.errors import UserError, check_range
from meap_lit.modules.log_steps import ends_step

DECIDED = {
    **dict.fromkeys(("max_steps", "min_steps", "fast_dev_run"), "budget.max_steps"),
    **dict.fromkeys(("limit_train_batches", "overfit_batches"), "budget.max_steps"),
    **dict.fromkeys(("max_epochs", "min_epochs", "reload_dataloaders_every_n_epochs"), "budget.max_epochs"),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), "budget.val_every_n_steps"),
    "accumulate_grad_batches": "data.global_batch_size and data.micro_batch_size",
}
"""Options of the Trainer that follow from the budget, and what to set instead of each."""

_WITHOUT_EFFECT = {
    "max_epochs": (1, -1),
    "limit_train_batches": (1.0,),
    "overfit_batches": (0,),
    "val_check_interval": (1.0,),
}
"""Values of some of these, besides the Trainer's defaults, that have no effect."""

TRAINER_OPTIONS = ("precision", "gradient_clip_val")
"""Options of the Trainer that decide what a run learns."""


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuse options of the Trainer that would have no effect, or end a run before its budget is spent.

    Raises:
        UserError: If one of `DECIDED` is set.
    """
    parameters = inspect.signature(L.Trainer).parameters
    for name, instead in DECIDED.items():
        allowed = (None, parameters[name].default, *_WITHOUT_EFFECT.get(name, ()))
        value = options.get(name)
        if repr(value) not in map(repr, allowed):  # 1 batch is not 1.0 of them
            raise UserError(f"trainer.{name} {value} contradicts the budget, which decides it; state {instead} instead")


class TimeLimit(Timer):
    """End a process after `trainer.max_time`; a resumed run has the same time again.

    Lightning's Timer counts the time of earlier processes too, so a run that it ended could not be resumed.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # ranks wait for each other here; and micro-batches of a step that does not end would be trained for nothing
        if ends_step(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class Budget(L.Callback):
    """Set the Trainer's steps, gradient accumulation and validation interval from the data module's batch sizes.

    Accumulation follows from the number of devices, so that a recipe, which sets its global batch, gives the same run
    on any number of them. Set one of `max_tokens`, `max_steps` and `max_epochs`.

    Args:
        max_tokens: Tokens to train on; a last step that would exceed them is left out.
        max_steps: Optimizer steps.
        max_epochs: Passes over the datasets, in whole optimizer steps: rows at the end that do not fill one are left
            out, and named at the start of the run. With several datasets an epoch has as many samples as they have
            together.
        val_every_n_steps: Optimizer steps between validations. A validation also follows the last step.

    Raises:
        UserError: If not exactly one of the three is set, or a number is below 1.
    """

    incidental: ClassVar = ("val_every_n_steps",)
    """Options that do not decide what a run learns; runs that differ in them alone compare as equal in a report."""

    def __init__(
        self,
        max_tokens: int | None = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        val_every_n_steps: int = 1000,
    ) -> None:
        limits = {"max_tokens": max_tokens, "max_steps": max_steps, "max_epochs": max_epochs}
        if sum(limit is not None for limit in limits.values()) != 1:
            stated = [f"budget.{name} {limit}" for name, limit in limits.items() if limit is not None]
            raise UserError(
                f"{' and '.join(stated)} contradict each other; set one to null, such as --{stated[0].split()[0]} null"
                if stated
                else f"set one of {', '.join(f'budget.{name}' for name in limits)}"
            )
        for name, limit in limits.items():
            check_range(f"budget.{name}", limit, "[1, inf)")
        check_range("budget.val_every_n_steps", val_every_n_steps, "[1, inf)")
        [self.stated] = (f"budget.{name} {limit}" for name, limit in limits.items() if limit is not None)
        """The limit in words, such as `budget.max_steps 5`."""
        self.max_tokens = max_tokens
        self.max_steps = max_steps
        self.max_epochs = max_epochs
        self.val_every_n_steps = val_every_n_steps
        self.left_out: str | None = None
        """The rows of the last epoch beyond the last whole step, in words; None if there are none."""

    def steps(self, data: StreamingData) -> int:
        """Return the number of optimizer steps in the budget.

        Raises:
            UserError: If it is less than one step.
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.max_epochs is not None:
            steps = data.rows_in(self.max_epochs) // data.global_batch_size
            if steps < 1:
                raise UserError(
                    f"{self.max_epochs} epochs (budget.max_epochs) fill less than one optimizer step of "
                    f"data.global_batch_size {data.global_batch_size} rows; lower it or raise the epochs"
                )
            return steps
        assert self.max_tokens is not None
        if self.max_tokens < data.tokens_per_step:
            raise UserError(
                f"budget.max_tokens {self.max_tokens} is less than one optimizer step, "
                f"data.global_batch_size x data.seq_len = {data.tokens_per_step} tokens"
            )
        return self.max_tokens // data.tokens_per_step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not before the Trainer exists: it resolves `trainer.devices auto` and tensor parallelism into the number of
        # data-parallel ranks, and epochs are counted in data that the run itself may prepare.
        if stage != "fit":
            return
        data = trainer.datamodule
        accumulation = data.accumulation(data.rank_slice.num_replicas)
        max_steps = self.steps(data)
        trainer.accumulate_grad_batches = accumulation
        trainer.fit_loop.epoch_loop.max_steps = max_steps
        trainer.val_check_interval = self.val_every_n_steps * accumulation
        end, rows = max_steps * data.global_batch_size, data.rows_in(self.max_epochs) if self.max_epochs else 0
        if end < rows:
            self.left_out = data.describe_rows(end, rows)

    def check_resume(self, trainer: L.Trainer, checkpoint: Mapping[str, Any], path: str | Path | None) -> None:
        """Refuse a checkpoint that this run cannot resume from; end the process if nothing is left to train.

        Raises:
            UserError: If the checkpoint is of another kind of run, or of other data.
            SystemExit: With status 0 if the budget is spent, so that a restarted job counts as done.
        """
        kind = type(trainer.datamodule).__qualname__
        if kind not in checkpoint:
            raise UserError(
                f"checkpoint {path} (--ckpt_path) was not written by a run on {kind}, and no such run resumes from it; "
                f"to start from its weights, set model.init_from"
            )
        trainer.datamodule.load_state_dict(checkpoint[kind])
        step = checkpoint["global_step"]
        if step >= trainer.max_steps:
            if trainer.is_global_zero:
                print(
                    f"the budget is spent: checkpoint {path} is at optimizer step {step}, and "
                    f"{self.stated} ends at step {trainer.max_steps}; raise it to continue, or start another "
                    f"run with --ckpt_path null --trainer.logger.name NAME"
                )
            raise SystemExit(0)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a run that has spent its budget continue with a larger one."""
        if trainer.state.fn != "fit":
            return
        self.check_resume(trainer, checkpoint, trainer.ckpt_path)
        # for Lightning the only epoch has ended when the budget is spent
        for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            counts.update(processed=0, completed=0)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates once more before it ends

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print which rows are left out, and count the micro-batches of a resumed run as with the present devices."""
        if self.left_out is not None and trainer.is_global_zero:
            print(
                f"budget.max_epochs {self.max_epochs} leaves out {self.left_out} at the end, less than an optimizer "
                f"step of data.global_batch_size {trainer.datamodule.global_batch_size} rows; a smaller one leaves out "
                f"fewer"
            )
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        progress.increment_by(trainer.global_step * trainer.accumulate_grad_batches - progress.ready)
