"""Retrieval from context, measured at every validation."""

from pathlib import Path

import lightning as L
import numpy as np

from meap_lit.evaluation.retrieval import RetrievalGrid, build_items, plot_grid, score_items


class RetrievalProbe(L.Callback):
    """Asks for a fact stated somewhere in the context; logs accuracy and its picture over length and depth.

    The facts are made up (`meap_lit/data/synthetic.py`) and the answer is chosen among the people that the context
    names, so guessing gives `1 / num_options`. It needs no data of the user's and works with any tokenizer.

    Args:
        lengths: Lengths of the context in tokens, question and answer included; those longer than data.seq_len are
            left out. None asks nothing.
        depths: Where the fact stands, from 0 (first) to 1 (last).
        num_items: Questions for each length and depth.
        num_options: People to choose from.
        batch_size: Sequences scored at once.
        seed: Seed of the questions; the same at every validation.
    """

    def __init__(
        self,
        lengths: list[int] | None = None,
        depths: list[float] | None = None,
        num_items: int = 8,
        num_options: int = 4,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.lengths = lengths or []
        self.depths = depths or [0.0, 0.25, 0.5, 0.75, 1.0]
        self.num_items = num_items
        self.num_options = num_options
        self.batch_size = batch_size
        self.seed = seed
        self.accuracy: np.ndarray | None = None
        self.figure_path: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule
        lengths = tuple(length for length in self.lengths if length <= data.seq_len)
        self.grid = RetrievalGrid(lengths, tuple(self.depths), self.num_items, self.num_options, self.seed)
        self._items = build_items(self.grid, data.tokenizer) if lengths else []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._items:
            return
        with trainer.precision_plugin.forward_context():
            self.accuracy = score_items(pl_module.decoder, self._items, self.grid, batch_size=self.batch_size)
        pl_module.log("val/retrieval_accuracy", float(self.accuracy.mean()), prog_bar=True, sync_dist=True)
        log_dir = trainer.log_dir  # asked of every rank, since Lightning broadcasts it
        if trainer.is_global_zero and log_dir:
            figure = plot_grid(self.accuracy, self.grid, title=f"Retrieval at step {trainer.global_step}")
            for logger in trainer.loggers:
                if hasattr(logger.experiment, "add_figure"):
                    logger.experiment.add_figure("retrieval", figure, trainer.global_step)
            self.figure_path = Path(log_dir, "retrieval.png")
            self.figure_path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.figure_path, dpi=120)
