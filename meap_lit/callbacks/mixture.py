"""What share of the tokens of a run each of its datasets really gave."""

from typing import Any

import lightning as L

from meap_lit.modules.log_steps import host_number, is_logged


class Mixture(L.Callback):
    """Logs the share of the tokens trained on so far that came from each dataset, as `mix/NAME`, if there are several.

    The order of a run is a pure function of the position, so what stood at the positions up to now is counted, not
    measured: the figure is exact on any number of devices and after a resume, and no device is asked for it. It need
    not meet the weights of the recipe, which are shares of samples: conversations differ in length.
    """

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}
        """Share of the tokens so far by name of the dataset; empty before anything was logged."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = trainer.datamodule
        at_step_end = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if len(data.datasets) == 1 or not at_step_end or not is_logged(trainer, trainer.global_step):
            return
        counts = trainer.train_dataloader.dataset.order.count_by_source(data.samples_seen)
        self.shares = dict(zip(data.names.values(), (counts / counts.sum()).tolist(), strict=True))
        pl_module.log_dict({f"mix/{name}": host_number(share) for name, share in self.shares.items()})
