"""A run that is told to stop saves, says how to go on, and goes on as if it had never stopped."""

import csv
import signal
import sys
from functools import partial
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meap_lit.callbacks import stopping
from meap_lit.cli import main
from tests.support.checkpoints import read
from tests.support.toy_module import fork, fork_command


def fit(recipe, *arguments):
    """Run the command in a process of its own; its exit status and what it wrote."""
    [status], log = fork_command(["fit", "--config", recipe, *arguments])
    return status, log


def signal_at(batch, number):
    return [
        "--trainer.callbacks+=tests.support.interruption.SignalAt",
        *("--trainer.callbacks.batch", str(batch)),
        *("--trainer.callbacks.number", str(int(number))),
    ]


def weights(folder):
    return read(folder / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize(
    ("number", "status", "batch", "step", "options"),
    [
        (signal.SIGTERM, 143, 13, 7, ()),  # in the second of two micro-batches
        (signal.SIGINT, 130, 8, 5, ()),  # in the first, where a checkpoint and a validation are due
        (signal.SIGTERM, 143, 29, 8, ("--data.micro_batch_size", "2")),  # four micro-batches
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(toy_recipe, tmp_path, number, status, batch, step, options):
    run = partial(fit, toy_recipe, *options)
    assert run()[0] == 0
    found, log = fit(toy_recipe, *options, *signal_at(batch, number))
    runs = tmp_path / "runs" / "toy"
    checkpoint = runs / "version_1" / "checkpoints" / f"step={step}.ckpt"
    assert found == status
    assert [line for line in log.splitlines() if line.startswith("SIG")] == [
        f"{number.name}: stopped after optimizer step {step}, saved {checkpoint}; resume with: "
        f"python -m meap_lit fit --config {runs}/version_1/config.yaml --ckpt_path {checkpoint}"
    ]
    assert checkpoint.exists()
    assert fit(toy_recipe, *options, "--ckpt_path", "last")[0] == 0
    whole, resumed = weights(runs / "version_0"), weights(runs / "version_2")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_long_validation_is_broken_off(toy_recipe, tmp_path):
    """The run goes on with the next step; later validations are whole."""
    options = ["--budget.val_every_n_steps", "4", "--data.micro_batch_size", "2"]  # a checkpoint every 5
    assert fit(toy_recipe, *options)[0] == 0
    told = ["--trainer.callbacks+=tests.support.interruption.SignalInValidation", "--trainer.callbacks.step", "8"]
    status, log = fit(toy_recipe, *options, *told)
    assert status == 143
    assert "SIGTERM: stopped after optimizer step 8, saved" in log
    assert fit(toy_recipe, *options, "--ckpt_path", "last")[0] == 0
    runs = [tmp_path / "runs" / "toy" / f"version_{version}" for version in (0, 1, 2)]
    whole, resumed = weights(runs[0]), weights(runs[2])
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    losses = [validations(run) for run in runs]
    assert {step: losses[0][step] for step in losses[1]} == losses[1]
    assert len(losses[1]) == 1, "the broken one is not logged"
    assert {step: losses[0][step] for step in losses[2]} == losses[2]
    assert len(losses[2]) >= 1


def validations(run):
    """The logged validation losses by step."""
    events = EventAccumulator(str(run))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("val/loss")}


def test_a_run_without_checkpoints_says_that_none_was_saved(toy_recipe, tmp_path):
    options = ["--trainer.enable_checkpointing", "false", *signal_at(3, signal.SIGTERM)]
    status, log = fit(toy_recipe, *options)
    assert status == 143
    assert "SIGTERM: stopped after optimizer step 2; no checkpoint was saved, since trainer.enable" in log


def test_a_second_signal_ends_the_run_at_once(toy_recipe, tmp_path):
    options = [*signal_at(4, signal.SIGTERM), *signal_at(4, signal.SIGINT)]
    status, log = fit(toy_recipe, *options)
    assert status == 130
    assert "stopped after" not in log
    assert not list((tmp_path / "runs" / "toy" / "version_0" / "checkpoints").iterdir())


def test_a_kill_after_a_checkpoint_loses_nothing_that_was_logged_before(toy_recipe, tmp_path):
    """A CSVLogger writes every 100 steps, TensorBoard from a thread."""
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(tmp_path)]
    killed = signal_at(11, signal.SIGKILL)  # in the middle of step 6; there is a checkpoint of step 5
    fit(toy_recipe, *logger, *killed)
    [folder] = (path.parent for path in tmp_path.rglob("step=5.ckpt"))
    rows = list(csv.DictReader((folder.parent / "metrics.csv").open()))
    assert {int(row["step"]) for row in rows if row["train/loss"]} == set(range(5))


@pytest.mark.parametrize("log_every_n_steps", ["1", "1000"])
def test_all_ranks_leave_for_the_signal_of_one(toy_recipe, tmp_path, monkeypatch, log_every_n_steps):
    """With the status of that signal, by which a job is requeued, and not only at steps that are logged."""
    monkeypatch.setattr(stopping, "ASK_EVERY_S", 0.0)
    words = ["fit", "--config", str(toy_recipe), "--config", "recipes/strategy/ddp.yaml", "--trainer.devices", "2"]
    words += ["--trainer.log_every_n_steps", log_every_n_steps]
    words += [*signal_at(5, signal.SIGUSR1), "--trainer.callbacks.rank", "1"]  # one micro-batch a step
    assert fork(lambda: sys.exit(main(words)), num_ranks=2, timeout=150) == [128 + signal.SIGUSR1, 0]
    checkpoints = (tmp_path / "runs" / "toy" / "version_0" / "checkpoints").glob("step=*.ckpt")
    assert {path.name for path in checkpoints} == {"step=5.ckpt", "step=6.ckpt"}


def test_ranks_check_after_every_step_that_takes_longer_than_they_may_wait(monkeypatch):
    clock = iter([0.0, 80.0, 80.0, 80.1, 160.0, 160.0, 160.1, 160.1])  # two readings at a check after a step
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))
    stop = stopping.StopOnSignal()
    reduced = mock.Mock(side_effect=lambda told, reduce_op: told)
    trainer = mock.Mock(world_size=2, global_step=0, received_sigterm=False, log_every_n_steps=1000, max_steps=10**6)
    trainer.strategy.reduce, trainer.strategy.root_device, trainer.accumulate_grad_batches = reduced, "cpu", 1
    monkeypatch.setattr(stopping.signal, "signal", lambda *args: None)
    stop.on_train_start(trainer, mock.Mock())
    for step in (1, 2, 3, 4, 5):
        trainer.global_step = step
        stop.on_train_batch_end(trainer, mock.Mock(), None, None, step)
        if step == 1:
            trainer.state.fn, trainer.sanity_checking = "fit", False
            stop.on_validation_batch_start(trainer, mock.Mock(), None, 0)
            assert reduced.call_count == 2
    assert reduced.call_count == 4, "steps 1 and 2 took 80 seconds; after step 3, of 0.1 seconds, 50 may pass"
