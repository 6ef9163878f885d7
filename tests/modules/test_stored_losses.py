"""A short run on a CPU against losses that were stored: an optimization that changes numbers is seen here.

The bound leaves room for another order of summation and no more. A change that is meant to alter the numbers, such as
of the initialization, the masks, the order of samples or the loss, stores them anew and says so.
"""

import lightning as L
import pytest

from meap_lit.recipe.cli import RecipeCLI

BOUND = 2e-5
"""Relative. Another order of summation changes these losses by less than 1e-6."""

STORED = {
    0.15: [
        5.906866,
        5.671860,
        5.630304,
        5.588653,
        5.439413,
        5.402198,
        4.997378,
        5.072556,
        4.998686,
        5.014067,
        4.898698,
        4.851998,
        4.822237,
        4.814383,
        4.637414,
        4.539638,
        4.562270,
        4.653279,
        4.476891,
        4.613475,
        4.673524,
        4.573491,
        4.526413,
        4.614160,
    ],
    0.0: [
        5.937077,
        5.753097,
        5.678124,
        5.675548,
        5.524040,
        5.457790,
        5.047354,
        5.127383,
        5.034564,
        5.059747,
        4.941863,
        4.915448,
        4.858396,
        4.848111,
        4.698854,
        4.611107,
        4.634927,
        4.707841,
        4.554118,
        4.657429,
        4.715769,
        4.622907,
        4.556200,
        4.666281,
    ],
}
"""Losses of the micro-batches, two in a step, by P."""


class Losses(L.Callback):
    """Keeps the mean loss of every micro-batch."""

    values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


@pytest.mark.parametrize("ratio", STORED)
def test_losses_are_those_stored(ratio, toy_recipe, monkeypatch):
    monkeypatch.setattr(Losses, "values", [])
    options = ["--model.mask_ratio", str(ratio), "--budget.val_every_n_steps", "100"]
    options += ["--trainer.callbacks+", f"{__name__}.Losses"]
    RecipeCLI.run(["fit", "--config", str(toy_recipe), *options])
    assert Losses.values == pytest.approx(STORED[ratio], rel=BOUND, abs=0)
