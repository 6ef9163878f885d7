"""Stop a run on a signal (SIGTERM, SIGUSR1, Ctrl-C): finish the step, save, and print how to resume."""

import math
import shlex
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
import torch

from meap_lit.callbacks.checkpoint import Checkpoint
from meap_lit.data.stream.loader import STOP_SIGNALS
from meap_lit.modules.log_steps import ends_step, is_logged
from meap_lit.parallel.ranks import Ranks
from meap_lit.private import skip_sigterm_broadcast

ASK_EVERY_S = 5.0
"""Maximum time of training between two checks among ranks, in seconds, rounded to whole steps."""

VALIDATION_BATCHES = 10
"""Validation batches between two checks of several ranks."""


class StopOnSignal(L.Callback):
    """On a signal of `STOP_SIGNALS`, finish the optimizer step, save, and exit with status 128 + signal.

    The status is 143 for SIGTERM, 130 for SIGINT, and 138 for SIGUSR1, which SLURM can send before a job's time limit.

    All ranks stop after the same step, whichever of them got the signal. A check among ranks makes the host wait for
    its device. So several ranks check at steps that are logged, where it waits anyway, and about every `ASK_EVERY_S`
    seconds, by the time of the steps before: steps may take minutes, and a job has little time after a signal. A
    validation is aborted and not repeated. A second signal ends the process at once, without saving.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._leaving_for = 0
        """The signal for which all ranks exit."""
        self._asked_step, self._asked_at = 0, 0.0
        """Optimizer step and time of the last check among ranks."""
        self._next_step = 0
        """Optimizer step of the next one."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers, also for SIGTERM, at which Lightning would end a run between two micro-batches."""
        self._signal, self._leaving_for = None, 0
        self._asked_step, self._asked_at = trainer.global_step, time.monotonic()
        self._next_step = trainer.global_step + 1
        if trainer.received_sigterm:  # during setup, when there is nothing to save
            raise SystemExit(128 + signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)  # Lightning's teardown restores the earlier handlers
            skip_sigterm_broadcast(trainer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise SystemExit(128 + number)
        self._signal = number

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        is_due = trainer.world_size == 1 or is_logged(trainer, step) or step >= self._next_step
        if is_due and ends_step(trainer, batch_idx):
            self._ask(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        is_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if is_training and (trainer.world_size == 1 or batch_idx % VALIDATION_BATCHES == 0):
            self._ask(trainer)
            self._leave(trainer)

    def _ask(self, trainer: L.Trainer) -> None:
        """Check whether any rank got a signal; if so, save."""
        self._leaving_for = self._signal or 0
        if trainer.world_size > 1:
            step = trainer.global_step
            num_steps = step - self._asked_step  # 0 in a validation, so the time of a step is not known
            seconds = (time.monotonic() - self._asked_at) / num_steps if num_steps else math.inf
            told = torch.tensor([self._leaving_for, seconds], dtype=torch.float32, device=trainer.strategy.root_device)
            number, slowest = trainer.strategy.reduce(told, reduce_op="max").tolist()
            self._leaving_for = int(number)
            self._asked_step, self._asked_at = step, time.monotonic()
            self._next_step = step + max(1, int(ASK_EVERY_S / max(slowest, 0.001)))  # the same on all ranks
        if self._leaving_for and isinstance(trainer.checkpoint_callback, Checkpoint):
            trainer.checkpoint_callback.save(trainer)

    # Lightning logs a step after its hooks, so the process exits at the next hook

    def on_validation_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._leave(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._leave(trainer)

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        if not self._leaving_for:
            return
        log_dir = trainer.log_dir  # called on every rank, since Lightning broadcasts it
        number = signal.Signals(self._leaving_for)
        if trainer.is_global_zero:
            print(f"{number.name}: {_how_to_resume(trainer, log_dir)}", file=sys.stderr)
        trainer.strategy.barrier("StopOnSignal")
        raise Ranks(trainer).exit(128 + number)


def _how_to_resume(trainer: L.Trainer, log_dir: str | None) -> str:
    stopped = f"stopped after optimizer step {trainer.global_step}"
    saver = trainer.checkpoint_callback
    if not isinstance(saver, Checkpoint) or saver.last_saved is None:
        return f"{stopped}; no checkpoint was saved, since trainer.enable_checkpointing is false"
    if not trainer.loggers:  # the recipe was not kept either
        return f"{stopped}, saved {saver.last_saved}; resume with the same command and --ckpt_path {saver.last_saved}"
    recipe, checkpoint = (shlex.quote(str(path)) for path in (f"{log_dir}/config.yaml", saver.last_saved))
    return (
        f"{stopped}, saved {saver.last_saved}; resume with: "
        f"python -m meap_lit fit --config {recipe} --ckpt_path {checkpoint}"
    )
