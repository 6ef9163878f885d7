"""The benchmark of the Trainer at toy size: whole turns are timed, of a run that has all that a run has."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import benchmarks.trainer
from benchmarks.step import TrainingStep
from benchmarks.trainer import Turn, Turns, benchmark, table, toy_decoder
from meap_lit.callbacks import Checkpoint, StepProgressBar, Throughput
from meap_lit.errors import UserError


@pytest.mark.slow
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trainers, run = [], benchmarks.trainer.fit

    def fit(recipe: dict[str, Any], folder: Path, callback: L.Callback) -> L.Trainer:
        trainers.append(run(recipe, folder, callback))
        return trainers[0]

    monkeypatch.setattr(benchmarks.trainer, "fit", fit)
    output = tmp_path / "results" / "trainer.md"
    benchmark(model="toy", micro_batch_size=2, turns=2, steps=10, output=output)
    report = output.read_text()
    assert report in capsys.readouterr().out
    assert "- 7,640 parameters, 2 rows of 16 tokens a step" in report
    assert "2 turns of 10 steps of each kind" in report
    assert "| bare loop | " in report
    trainer = trainers[0]
    assert trainer.global_step == 3 * 10 + 1, "a turn to warm up, two that count, and the step that ends the last"
    assert isinstance(trainer.logger, TensorBoardLogger)
    kinds = {type(callback) for callback in trainer.callbacks}
    assert {Checkpoint, StepProgressBar, Throughput} <= kinds
    turns = next(callback for callback in trainer.callbacks if isinstance(callback, Turns))
    assert turns.bare.num_steps == 4 * 10
    assert len(turns.turns) == 3
    assert all(0 < turn.fetch < turn.fit and turn.bare > 0 for turn in turns.turns)


def test_a_turn_is_the_mean_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test: 4 s in the bare loop and 6 s in the Trainer, for two steps each; 1 s in the fetcher."""
    bare = TrainingStep(toy_decoder(), 1, "fp32", torch.device("cpu"))
    monkeypatch.setattr(bare, "seconds", lambda action, ratio, times: 2.0 * times)
    now = iter([10.0, 12.0, 13.0, 16.0, 20.0])
    monkeypatch.setattr(benchmarks.trainer.time, "perf_counter", lambda: next(now))
    turns = Turns(bare, steps=2)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module = L.LightningModule()
    turns.setup(trainer, module, "fit")
    turns.on_train_batch_start(trainer, module, None, 0)  # at 10
    turns.on_train_batch_start(trainer, module, None, 1)
    with trainer.profiler.profile("run_training_batch"):
        pass
    with trainer.profiler.profile("[_TrainingEpochLoop].train_dataloader_next"):  # from 12 to 13
        pass
    turns.on_train_batch_start(trainer, module, None, 2)  # at 16
    assert turns.turns == [Turn(bare=2.0, fit=3.0, fetch=0.5)]


def test_table() -> None:
    rows = table([Turn(0.010, 0.011, 0.0001), Turn(0.020, 0.022, 0.0002), Turn(0.010, 0.013, 0.0003)])
    assert rows[2:6] == [
        "| bare loop | 10.00 | 10.00 to 15.00 |",
        "| `fit` | 13.00 | 12.00 to 17.50 |",
        "| `fit`, waiting for the next batch | 0.20 | 0.15 to 0.25 |",
        "| difference, turn by turn | 2.00 | 1.50 to 2.50 |",
    ]
    assert rows[-2].endswith("cost 2.00 ms a step, 10.00% of the bare loop's")
    assert rows[-1].startswith("- 1.30% of the time")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"turns": 1}, "--turns must be at least 2"),
        ({"micro_batch_size": 0}, "--micro_batch_size at least 1"),
        ({"steps": 15}, r"^--steps must be a multiple of 10, after which `fit` logs; got 15$"),
        ({"steps": 0}, "--steps must be a multiple of 10"),
    ],
)
def test_wrong_values_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark(**arguments)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device; use --device cpu"):
        benchmark(device="cuda")
