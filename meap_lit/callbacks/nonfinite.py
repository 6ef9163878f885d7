"""Stop a run whose loss, gradients or weights are not finite, and keep such weights out of checkpoints."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from meap_lit.errors import UserError
from meap_lit.modules.log_steps import ends_step, is_logged
from meap_lit.parallel.ranks import Ranks
from meap_lit.parallel.sharding import is_finite


class StopOnNonFiniteLoss(L.Callback):
    """Stop the run when a loss, the gradients or the weights are not finite.

    The number of the first bad step stays on the device, as `DecoderModule` keeps that of the gradients. The host reads
    both where it waits anyway: at steps that are logged, at validation and at saving. The weights are checked when a
    run starts and at every save, so that a checkpoint holds only finite weights.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bad_loss_step = torch.full((), -1, dtype=torch.int64, device=pl_module.device)
        self._stop_if(trainer, not is_finite(pl_module.parameters()), _bad_start)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss: Tensor = outputs["loss"]
        is_new = ~torch.isfinite(loss) & (self._bad_loss_step < 0)
        step = batch_idx // trainer.accumulate_grad_batches + 1
        self._bad_loss_step.masked_fill_(is_new, step)
        if ends_step(trainer, batch_idx) and is_logged(trainer, trainer.global_step):
            self._check_steps(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check_steps(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the validation loss, which is logged by now."""
        loss = trainer.callback_metrics.get("val/loss")
        self._stop_if(trainer, loss is not None and not loss.isfinite(), _bad_validation)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_steps(trainer)
        trained = (parameter for parameter in pl_module.parameters() if parameter.requires_grad)
        self._stop_if(trainer, not is_finite(trained), _bad_weights)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_steps(trainer)  # a run may end at a step that is not logged

    def _check_steps(self, trainer: L.Trainer) -> None:
        """Stop if the loss or the gradients of any step so far were not finite."""
        of_gradients = getattr(trainer.lightning_module, "bad_gradient_step", None)
        loss, gradients = int(self._bad_loss_step), -1 if of_gradients is None else int(of_gradients)
        self._stop_if(trainer, max(loss, gradients) >= 0, partial(_bad_step, loss, gradients))

    def _stop_if(self, trainer: L.Trainer, is_bad: bool, describe: Callable[[L.Trainer, str | None], str]) -> None:
        """End the run on all ranks if something is wrong on one; a rank may notice it steps before the others.

        `describe` makes the message from the Trainer and the name of a parameter that is not finite, if there is one.
        """
        if not trainer.strategy.reduce_boolean_decision(is_bad, all=False):
            return
        ranks = Ranks(trainer)
        names = ranks.do(partial(_not_finite, trainer))  # one rank may hold the bad part of a sharded parameter
        name = next((name for name in names if name is not None), None)

        def complain() -> None:
            if is_bad:
                raise UserError(describe(trainer, name))

        ranks.do(complain)


def _bad_step(loss: int, gradients: int, trainer: L.Trainer, name: str | None) -> str:
    # a loss that is not finite causes such gradients
    found = f"training loss is not finite at optimizer step {loss}"
    if loss < 0 or 0 <= gradients < loss:
        found = f"gradients are not finite at optimizer step {gradients}, though the loss is"
    return f"the {found}; {_advice(trainer)}"


def _bad_weights(trainer: L.Trainer, name: str | None) -> str:
    return (
        f"{name} is not finite after optimizer step {trainer.global_step}, and no checkpoint of it is "
        f"saved; {_advice(trainer)}"
    )


def _bad_start(trainer: L.Trainer, name: str | None) -> str:
    if trainer.ckpt_path:
        return (
            f"checkpoint {trainer.ckpt_path} (--ckpt_path) has weights that are not finite, in {name}; resume from an "
            f"earlier one"
        )
    source = getattr(trainer.lightning_module, "init_from", None)
    return f"the weights of {source} (model.init_from) are not all finite: {name} is not; name another checkpoint"


def _bad_validation(trainer: L.Trainer, name: str | None) -> str:
    losses = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/loss")}
    found = ", ".join(f"{name} {value}" for name, value in losses.items() if not math.isfinite(value))
    if trainer.state.fn == "fit":
        advice = _advice(trainer, trainer.global_step - 1)
        return f"the validation loss is not finite at optimizer step {trainer.global_step} ({found}); {advice}"
    cause = "though all weights are; check the data" if name is None else f"as {name} is not; take another checkpoint"
    return f"the validation loss of {trainer.ckpt_path or 'the model'} is not finite ({found}), {cause}"


def _advice(trainer: L.Trainer, last_step: float = math.inf) -> str:
    """Return how to resume from the newest checkpoint up to `last_step`."""
    steps = getattr(trainer.checkpoint_callback, "best_k_models", {})  # by path; may name one that was not saved
    good = [path for path, step in steps.items() if step <= last_step and Path(path).exists()]
    last = max(good, key=lambda path: steps[path]) if good else trainer.ckpt_path
    if not last:
        return "no good checkpoint was saved yet; start again with a lower --model.optimizer.lr, or check the data"
    return (
        f"last good checkpoint: {last}; resume from it (--ckpt_path) with a lower --model.optimizer.lr, or check the "
        f"data"
    )


def _not_finite(trainer: L.Trainer) -> str | None:
    """Return the name of the first parameter that is not finite on this rank, if any is."""
    named = trainer.lightning_module.named_parameters()
    return next((name for name, parameter in named if not is_finite([parameter])), None)
