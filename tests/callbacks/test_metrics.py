"""A killed and resumed run has each value once in its table."""

import math
import os
import signal
from collections import Counter

import torch

from meap_lit.callbacks.metrics import METRICS_FILE, MetricsTable, Point, read_metrics
from meap_lit.recipe.cli import RecipeCLI
from tests.support.toy_module import fork


def test_a_run_that_is_killed_and_resumes_in_its_folder_has_each_value_once(toy_recipe, tmp_path):
    words = ["fit", "--config", str(toy_recipe), "--trainer.logger.init_args.version", "seed_1"]
    killed = ["--trainer.callbacks+=tests.support.interruption.SignalAt", "--trainer.callbacks.batch", "15"]
    killed += ["--trainer.callbacks.number", str(int(signal.SIGKILL))]
    assert fork(lambda: RecipeCLI.run([*words, *killed])) == [-signal.SIGKILL]
    folder = tmp_path / "runs" / "toy" / "seed_1"
    before = read_metrics(folder)
    assert [point.step for point in before["train/loss"]] == list(range(1, 8)), "killed in step 8"
    RecipeCLI.run([*words, "--ckpt_path", "last"])
    curves = read_metrics(folder)
    assert [point.step for point in curves["train/loss"]] == list(range(1, 13))
    assert [point.step for point in curves["val/loss"]] == [5, 10, 12]
    for name, points in before.items():
        kept = [point for point in points if point.step <= 5]
        assert curves[name][: len(kept)] == kept, f"{name} up to the checkpoint of step 5"
    rows = (folder / METRICS_FILE).read_text().splitlines()
    assert rows[0] == "step,name,value"
    assert max(Counter(row.rpartition(",")[0] for row in rows).values()) == 1
    assert not list(folder.glob(f"{METRICS_FILE}.*"))


def test_a_kill_in_the_validation_after_a_save_loses_no_value_up_to_the_last_checkpoint(toy_recipe, tmp_path):
    words = ["fit", "--config", str(toy_recipe), "--trainer.logger.init_args.version", "seed_1"]
    words += ["--checkpoint.every_n_steps", "2", "--budget.val_every_n_steps", "4"]
    killed = ["--trainer.callbacks+=tests.support.interruption.SignalInValidation", "--trainer.callbacks.step", "8"]
    killed += ["--trainer.callbacks.number", str(int(signal.SIGKILL))]
    assert fork(lambda: RecipeCLI.run([*words, *killed])) == [-signal.SIGKILL]
    folder = tmp_path / "runs" / "toy" / "seed_1"
    assert (folder / "checkpoints" / "last.ckpt").readlink().name == "step=6.ckpt", "step 8 is not validated"
    RecipeCLI.run([*words, "--ckpt_path", "last"])
    curves = read_metrics(folder)
    assert [point.step for point in curves["train/loss"]] == list(range(1, 13))
    assert [point.step for point in curves["val/loss"]] == [4, 8, 12]


def test_a_run_that_is_killed_soon_after_it_resumed_resumes_exactly(toy_recipe, tmp_path):
    """The first micro-batch of step 6 does not save step 5 again."""
    words = ["fit", "--config", str(toy_recipe), "--trainer.logger.init_args.version", "seed_1"]
    words += ["--budget.max_steps", "7"]
    whole = RecipeCLI.run([*words, "--trainer.logger.init_args.name", "whole"]).model.decoder.state_dict()
    killed = ["--trainer.callbacks+=tests.support.interruption.SignalAt", "--trainer.callbacks.batch", "11"]
    killed += ["--trainer.callbacks.number", str(int(signal.SIGKILL))]
    checkpoints = tmp_path / "runs" / "toy" / "seed_1" / "checkpoints"
    for resume in ([], ["--ckpt_path", "last"]):
        arguments = [*words, *killed, *resume]
        assert fork(lambda arguments=arguments: RecipeCLI.run(arguments)) == [-signal.SIGKILL]
        assert sorted(path.name for path in checkpoints.glob("*.ckpt")) == ["last.ckpt", "step=5.ckpt"]
    resumed = RecipeCLI.run([*words, "--ckpt_path", "last"]).model.decoder.state_dict()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_run_that_goes_on_after_its_end_counts_each_step_once(toy_recipe, tmp_path):
    words = ["fit", "--config", str(toy_recipe), "--trainer.logger.init_args.version", "seed_1"]
    words += ["--checkpoint.every_n_steps", "100", "--budget.val_every_n_steps", "2"]
    RecipeCLI.run([*words, "--budget.max_steps", "4"])
    RecipeCLI.run([*words, "--budget.max_steps", "6", "--ckpt_path", "last"])
    curves = read_metrics(tmp_path / "runs" / "toy" / "seed_1")
    assert [point.step for point in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in curves["val/loss"]] == [2, 4, 6]


def test_a_line_that_a_kill_cut_is_left_out(tmp_path):
    table = MetricsTable(tmp_path, 0)
    table.log_metrics({"val/loss/a, b": 0.1, "rate": math.inf}, 4)
    os.truncate(tmp_path / METRICS_FILE, (tmp_path / METRICS_FILE).stat().st_size - 2)
    assert read_metrics(tmp_path) == {"val/loss/a, b": [Point(5, 0.1)]}
    MetricsTable(tmp_path, 5).log_metrics({"rate": 2.5}, 5)
    assert read_metrics(tmp_path) == {"val/loss/a, b": [Point(5, 0.1)], "rate": [Point(6, 2.5)]}
    MetricsTable(tmp_path, 0)
    assert read_metrics(tmp_path) == {}, "a run that starts anew"


def test_a_folder_without_table_has_no_curves(tmp_path):
    assert read_metrics(tmp_path) == {}
