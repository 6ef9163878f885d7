"""Python's collector runs at given steps while training, and as before afterwards."""

import gc

import lightning as L
import pytest

from meap_lit import cli
from meap_lit.recipe.cli import RecipeCLI


class Watch(L.Callback):
    """Note whether the collector is on, and which generation was collected after which step."""

    def __init__(self):
        self.is_on, self.collected, self.step = [], [], 0
        gc.callbacks.append(self._note)

    def _note(self, phase, info):
        if phase == "start" and self.is_on:
            self.collected.append((self.step, info["generation"]))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.is_on.append(gc.isenabled())
        self.step = trainer.global_step + 1


def run(recipe, monkeypatch, *words):
    watch = Watch()
    monkeypatch.setattr("meap_lit.callbacks.garbage.CollectGarbage.every_n_steps", 4)
    make = RecipeCLI.make_trainer
    monkeypatch.setattr(RecipeCLI, "make_trainer", lambda cli, options, found: make(cli, options, [*found, watch]))
    try:
        status = cli.main(["fit", "--config", str(recipe), *words])
    finally:
        gc.callbacks.remove(watch._note)
    return status, watch


def test_the_collector_runs_at_given_steps_and_validations_only(toy_recipe, monkeypatch):
    status, watch = run(toy_recipe, monkeypatch, "--budget.max_steps", "9", "--budget.val_every_n_steps", "6")
    assert status == 0
    assert not any(watch.is_on)
    steps = {step: generation for step, generation in watch.collected if step < 9}
    assert steps == {4: 1, 6: 2, 8: 1}
    assert gc.isenabled()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_before_after_a_run_that_failed(toy_recipe, monkeypatch, was_on):
    (gc.enable if was_on else gc.disable)()
    try:
        status, _ = run(toy_recipe, monkeypatch, "--trainer.callbacks+=tests.support.breakdown.BreakAtStep7")
        assert status == 2
        assert gc.isenabled() is was_on
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_the_allocator_of_a_gpu_grows_its_segments_unless_it_is_configured(toy_recipe, monkeypatch, name):
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(known, "")  # restored after the test
        monkeypatch.delenv(known)
    if name is not None:
        monkeypatch.setenv(name, "mine")
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(toy_recipe), "--print_config"])
    found = {known: cli.os.environ.get(known) for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    expected = {name: "mine"} if name is not None else cli.ALLOCATOR
    assert {known: value for known, value in found.items() if value is not None} == expected
