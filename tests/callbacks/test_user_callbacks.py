"""Callbacks of users and of Lightning, by `trainer.callbacks`, beside those of the package."""

import lightning as L
import numpy as np
import pytest

from meap_lit.cli import main
from meap_lit.errors import UserError
from meap_lit.recipe.cli import RecipeCLI
from tests.support.checkpoints import read

STOP_EARLY = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor"]
EARLY = "EarlyStopping{'monitor': 'val/loss', 'mode': 'min'}"


class KeepsNumPy(L.Callback):
    """Keeps a number of NumPy, which only code in a checkpoint could restore."""

    def state_dict(self):
        return {"best": np.float64(1.5)}


class Interrupts(L.Callback):
    """Stands for a user who presses Ctrl-C before the first step."""

    def on_fit_start(self, trainer, pl_module):
        raise KeyboardInterrupt


def fit(recipe, *words):
    return RecipeCLI.run(["fit", "--config", str(recipe), *words])


def test_a_state_that_could_not_be_read_back_ends_the_run_at_its_first_save(toy_recipe, tmp_path):
    with pytest.raises(
        UserError, match=r"the state of callback KeepsNumPy \(\{'best': .*1.5.*\}\) cannot be read back"
    ):
        fit(toy_recipe, "--trainer.callbacks+=tests.callbacks.test_user_callbacks.KeepsNumPy")
    assert not list(tmp_path.rglob("step=*"))


def test_a_checkpoint_has_what_a_callback_learned_from_the_validation_of_its_step(toy_recipe, tmp_path):
    fit(toy_recipe, *STOP_EARLY, "val/loss", "--budget.max_steps", "5")
    [checkpoint] = tmp_path.rglob("step=5.ckpt")
    assert read(checkpoint)["callbacks"][EARLY]["best_score"] < 10  # infinite before a validation


def test_a_resumed_run_has_the_options_of_its_recipe(toy_recipe):
    words = [*STOP_EARLY, "val/loss", "--trainer.callbacks.patience"]
    fit(toy_recipe, *words, "3", "--budget.max_steps", "5")
    cli = fit(toy_recipe, *words, "7", "--budget.max_steps", "6", "--ckpt_path", "last")
    [early] = [callback for callback in cli.trainer.callbacks if callback.state_key == EARLY]
    assert early.patience == 7
    assert early.best_score < 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*STOP_EARLY, "val/los"],
            "trainer.callbacks: Early stopping conditioned on metric `val/los` which is not avail",
        ),
        (
            [*STOP_EARLY, "val/loss", *STOP_EARLY, "val/loss"],
            "cannot build what the recipe names (RuntimeError): Found more than one stateful callback",
        ),
        (
            ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"],
            "trainer.callbacks ModelCheckpoint would take the place of `checkpoint`",
        ),
    ],
)
def test_wrong_callbacks_are_named_in_one_line(toy_recipe, capfd, words, message):
    assert main(["fit", "--config", str(toy_recipe), *words]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {message}"), last


def test_an_interrupt_before_the_first_step_has_the_status_of_an_interrupt(toy_recipe):
    assert main(["fit", "--config", str(toy_recipe), "--trainer.callbacks+=" + f"{__name__}.Interrupts"]) == 130


def test_a_refused_resume_leaves_the_recipe_of_the_run(toy_recipe, tmp_path, capfd):
    words = ["fit", "--config", str(toy_recipe), "--trainer.logger.version", "mine", "--budget.max_steps", "2"]
    assert not main(words)
    recipe = tmp_path / "runs" / "toy" / "mine" / "config.yaml"
    before = recipe.read_bytes()
    other = ["--ckpt_path", "last", "--budget.max_steps", "4", "--model.decoder.num_layers", "3"]
    assert main([*words, *other]) == 2
    assert "decoder.num_layers" in capfd.readouterr().err
    assert recipe.read_bytes() == before
