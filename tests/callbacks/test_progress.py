"""A terminal gets a bar that moves with every micro-batch; a log file gets a line now and then."""

import re
import sys
import time

import lightning as L
import pytest

from meap_lit.callbacks import progress
from meap_lit.callbacks.metrics import read_metrics
from meap_lit.recipe.cli import RecipeCLI


class Slow(L.Callback):
    """Takes longer for a micro-batch than a terminal's bar waits before it is drawn again."""

    def on_train_batch_start(self, *args, **kwargs):
        time.sleep(0.12)


def shown(toy_recipe, monkeypatch, capsys, *words, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    options = ["--trainer.enable_progress_bar", "true", "--trainer.callbacks", f"{__name__}.Slow"]
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Slow.__module__])
    RecipeCLI.run(["fit", "--config", str(toy_recipe), *options, *words])
    return capsys.readouterr().out


def check_metrics(text, folder):
    """Compare the values of a line with those that were logged."""
    curves = read_metrics(folder)
    for name, key in (("loss", "train/loss"), ("val/loss", "val/loss")):
        value = float(re.search(rf"(?<![/\w]){name}[= ]([0-9.]+)", text)[1])
        assert value == pytest.approx(curves[key][-1].value, rel=0.01), name
    assert re.search(r"tokens/s[= ][\d,]+", text)
    assert "v_num" not in text


def test_a_bar_moves_with_every_micro_batch_and_knows_the_time_left(toy_recipe, tmp_path, monkeypatch, capsys):
    words = ["--budget.max_steps", "4", "--trainer.log_every_n_steps", "4"]
    out = shown(toy_recipe, monkeypatch, capsys, *words, is_terminal=True)
    drawn = re.findall(r"step (\d+)/4 +(\d+)%\|[^|]*\| \[([\d:]+)<([\d:?]+)(.*?)\]", out)
    # two micro-batches of each of four steps, of which only the last is logged
    assert {int(percent) for _, percent, *_ in drawn} == {0, 12, 25, 38, 50, 62, 75, 88, 100}
    first = next(state for state in drawn if state[1] == "12")
    assert first[0] == "0"
    assert first[3] != "?"
    assert re.search(r"tokens/s=[\d,]+$", first[4])
    check_metrics(drawn[-1][4], tmp_path / "runs/toy/version_0")


def test_a_resumed_run_continues_the_bar(toy_recipe, monkeypatch, capsys):
    shown(toy_recipe, monkeypatch, capsys, "--budget.max_steps", "2", is_terminal=True)
    words = ["--budget.max_steps", "4", "--ckpt_path", "last"]
    out = shown(toy_recipe, monkeypatch, capsys, *words, is_terminal=True)
    assert "step 2/4  50%" in out
    assert "step 0/4" not in out


def test_a_log_file_gets_lines(toy_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.5)
    words = ["--budget.max_steps", "12", "--trainer.log_every_n_steps", "5"]
    out = shown(toy_recipe, monkeypatch, capsys, *words, is_terminal=False)
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert "\r" not in out
    # 24 micro-batches of 0.12 s, validations after steps 5, 10 and 12
    assert 5 <= len(lines) <= 10
    steps = [int(re.match(r"step (\d+)/12 \([\d.]+%\), ", line)[1]) for line in lines]
    assert steps == sorted(steps)
    assert steps[0] < 5
    assert re.search(r"\), tokens/s [\d,]+, \d+:\d\d:\d\d left$", lines[0])
    check_metrics(lines[-1], tmp_path / "runs/toy/version_0")
    assert lines[-1].startswith("step 12/12 (100.0%)")
    assert lines[-1].endswith(", 0:00:00 left")
    assert len(set(lines)) == len(lines)
