"""Show the steps of a run, its speed and the time left: a bar in a terminal, a line now and then in a log file."""

import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from meap_lit.modules.log_steps import ends_step, is_logged

SHOWN = {"train/loss": "loss", "throughput/tokens_per_second": "tokens/s"}
"""Training metrics that are shown, with shorter names. Lightning would read a `prog_bar` metric at every batch."""

FIRST_LINE_S, LONGEST_PAUSE_S = 10.0, 300.0
"""Seconds from the start to the first line of a log file, and at most between two lines. Pauses grow with the run."""


class StepProgressBar(TQDMProgressBar):
    """Count optimizer steps of the whole run instead of micro-batches of an epoch.

    The bar moves with every micro-batch. Metrics are read at logged steps only, so that it never waits for the device.
    Speed and time left are known from the first micro-batch on: a step may have many. If the output is not a terminal,
    a line replaces the bar: after `FIRST_LINE_S` seconds, then at growing intervals, at validations and at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_terminal = sys.stdout.isatty()
        self._metrics: dict[str, int | str | float] = {}

    def init_train_tqdm(self) -> Tqdm:
        is_shown = self._is_terminal and self.is_enabled
        return Tqdm(
            disable=not is_shown,
            file=sys.stdout,
            dynamic_ncols=True,
            smoothing=0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
        )

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        micro_batches = trainer.accumulate_grad_batches
        self._done = self._first = trainer.global_step * micro_batches
        self._total = trainer.max_steps * micro_batches
        self._tokens = trainer.datamodule.tokens_per_step / micro_batches  # of one micro-batch on every device
        self._began, self._next_line, self._printed = time.monotonic(), FIRST_LINE_S, -1
        bar = self.train_progress_bar
        bar.reset(self._total)
        bar.initial = bar.n = self._done
        bar.set_description_str(self._step(trainer))

    def on_train_epoch_start(self, *args: Any) -> None:
        """Keep the bar: a run is one epoch for Lightning, and a resumed run starts none."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._done += 1
        if ends_step(trainer, batch_idx) and is_logged(trainer, trainer.global_step):
            self._metrics = self.get_metrics(trainer, pl_module)
        elif "loss" not in self._metrics:  # nothing is logged yet
            self._metrics = {"tokens/s": f"{self._tokens * self._rate():,.0f}"}
        bar = self.train_progress_bar
        bar.set_description_str(self._step(trainer), refresh=False)
        bar.set_postfix(self._metrics, refresh=False)
        bar.update()  # draws at most ten times a second
        if time.monotonic() - self._began >= self._next_line:
            self._print_line(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._metrics = self.get_metrics(trainer, pl_module)
        self.train_progress_bar.set_postfix(self._metrics)
        if self._printed != self._done:  # else by the last validation
            self._print_line(trainer)

    def init_validation_tqdm(self) -> Tqdm:
        if self.trainer.state.fn == "validate":
            return super().init_validation_tqdm()
        return Tqdm(disable=True)  # a validation during training takes seconds

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._metrics = self.get_metrics(trainer, pl_module)
            self._print_line(trainer)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float]:
        logged = trainer.callback_metrics
        metrics = {shown: logged[name].item() for name, shown in SHOWN.items() if name in logged}
        rate = metrics.pop("tokens/s", None) or self._tokens * self._rate()
        metrics |= {"tokens/s": f"{rate:,.0f}", **super().get_metrics(trainer, pl_module)}
        metrics.pop("v_num", None)
        return metrics

    def _step(self, trainer: L.Trainer) -> str:
        return f"step {trainer.global_step:,}/{trainer.max_steps:,}"

    def _rate(self) -> float:
        """Return the micro-batches per second since the start."""
        return (self._done - self._first) / max(time.monotonic() - self._began, 1e-9)

    def _print_line(self, trainer: L.Trainer) -> None:
        """Print where the run is, unless a bar shows it."""
        elapsed = time.monotonic() - self._began
        self._next_line = elapsed + min(LONGEST_PAUSE_S, FIRST_LINE_S + elapsed / 10)
        if self._is_terminal or not self.is_enabled:
            return
        left = timedelta(seconds=round((self._total - self._done) / max(self._rate(), 1e-9)))
        shown = [
            f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in self._metrics.items()
        ]
        self._printed = self._done
        share = f"{self._done / max(self._total, 1):.1%}"
        print(", ".join([f"{self._step(trainer)} ({share})", *shown, f"{left} left"]), flush=True)
