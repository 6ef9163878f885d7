"""Log the share of the tokens that each dataset contributed."""

from typing import Any

import lightning as L

from meap_lit.modules.log_steps import ends_step, host_number, is_logged


class Mixture(L.Callback):
    """Log the share of the tokens so far that came from each dataset, as `mix/NAME`, if there are several.

    The order of a run is a pure function of the position, so the shares are counted from it: they are exact on any
    number of devices and after a resume, and need no synchronization. They may differ from the weights of the recipe,
    which are shares of samples, where samples differ in length.
    """

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}
        """Share of the tokens so far by name of the dataset; empty before the first logged step."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = trainer.datamodule
        if len(data.datasets) == 1 or not ends_step(trainer, batch_idx) or not is_logged(trainer, trainer.global_step):
            return
        counts = trainer.train_dataloader.dataset.order.count_by_source(data.samples_seen)
        self.shares = dict(zip(data.names.values(), (counts / counts.sum()).tolist(), strict=True))
        pl_module.log_dict({f"mix/{name}": host_number(share) for name, share in self.shares.items()})
