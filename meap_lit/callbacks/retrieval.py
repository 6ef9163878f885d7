"""Measure retrieval from the context at validations."""

import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch

from meap_lit.callbacks.loggers import writers
from meap_lit.errors import check_range
from meap_lit.evaluation.figures import draw
from meap_lit.evaluation.task import Item
from meap_lit.evaluation.tasks.facts import FactRetrieval


class RetrievalProbe(L.Callback):
    """Ask for a fact in the context; log the accuracy, and its figure over length and depth.

    The facts are made up (`meap_lit/data/corpora/facts.py`). The model chooses the answer among the people in the
    context, so guessing gives `1 / num_options`. The probe needs no data and works with any tokenizer.

    A validation skips the probe if its share of the training time would exceed `max_share`. The first validation
    never does, because the cost is unknown until then.

    Args:
        lengths: Lengths of the context in tokens, with question and answer. Lengths above data.seq_len are left out;
            none disables the probe.
        depths: Positions of the fact, from 0 (first) to 1 (last).
        num_items: Questions for each length and depth.
        num_options: People to choose from.
        near_duplicates: Use names of two words, where other names have one of the words too.
        batch_tokens: Maximum number of positions scored at once; a longer question is scored alone. Memory limits it.
        max_share: Largest share of the training time, in (0, 1]; 1 runs at every validation.
        seed: Seed of the questions, which are the same at every validation.
        filler: File or folder of text whose sentences surround the facts; made-up sentences by default.

    Raises:
        UserError: If `max_share` is not in (0, 1], or `batch_tokens` is below 1.
    """

    incidental: ClassVar = ("batch_tokens", "max_share")
    """Options that do not decide an accuracy, see `Budget.incidental`."""
    off: ClassVar[dict[str, Any]] = {"lengths": []}
    """The options that `probe: null` sets."""

    def __init__(
        self,
        lengths: list[int] | None = None,
        depths: list[float] | None = None,
        num_items: int = 8,
        num_options: int = 4,
        near_duplicates: bool = False,
        batch_tokens: int = 16_384,
        max_share: float = 0.02,
        seed: int = 0,
        filler: str | None = None,
    ) -> None:
        check_range("probe.max_share", max_share, "(0, 1]", "; write 0.02 for 2%")
        check_range("probe.batch_tokens", batch_tokens, "[1, inf)")
        self.lengths = lengths or []
        self.num_options = num_options
        self.batch_tokens = batch_tokens
        self.max_share = max_share
        self._task_of = partial(
            FactRetrieval,
            depths=depths or [0.0, 0.25, 0.5, 0.75, 1.0],
            num_items=num_items,
            num_options=num_options,
            near_duplicates=near_duplicates,
            seed=seed,
            filler=filler,
        )
        self._began: float | None = None
        self._spent_s = self._last_s = 0.0
        self.accuracy: float | None = None
        self.figure_path: Path | None = None

    @property
    def question(self) -> str | None:
        """The first question, with its context; None if the probe is disabled."""
        return self._items[0].fields["text"] if self._items else None

    @property
    def asked_lengths(self) -> list[int]:
        """The lengths that fit the rows of the data."""
        return self.task.lengths if self._items else []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule
        lengths = [length for length in self.lengths if length <= data.seq_len]
        self._items: list[Item] = []
        if lengths:
            self.task = self._task_of(lengths=lengths)
            self._items = self.task.build(data.tokenizer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.monotonic()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._items or not self._has_time(trainer):
            return
        started = time.monotonic()
        self._probe(trainer, pl_module)
        self._last_s = time.monotonic() - started
        self._spent_s += self._last_s

    def _has_time(self, trainer: L.Trainer) -> bool:
        """Return whether one more probe keeps within the share, by the clock of the first rank."""
        if self._began is None or self._last_s == 0 or self.max_share == 1:
            return True
        share = (self._spent_s + self._last_s) / (time.monotonic() - self._began + self._last_s)
        return trainer.strategy.broadcast(share <= self.max_share)

    def _probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # compiling for the lengths of the probe would take longer than the probe
        with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            label = f"Retrieval at step {trainer.global_step}"
            result = self.task.result(pl_module.decoder, self._items, label, self.batch_tokens)
        self.accuracy = result.mean().value / 100
        pl_module.log("val/retrieval_accuracy", self.accuracy, prog_bar=True, sync_dist=True)
        log_dir = trainer.log_dir  # on every rank, since Lightning broadcasts it
        if trainer.is_global_zero and trainer.loggers and log_dir:  # without loggers it is the current folder
            figure = draw(self.task.plots[0], {label: [result]})
            assert figure is not None, "every item has a score"
            for writer in writers(trainer):
                writer.add_figure("retrieval", figure, trainer.global_step)
            self.figure_path = Path(log_dir, "retrieval.png")
            self.figure_path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.figure_path, dpi=120)
