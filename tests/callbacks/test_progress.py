"""The bar's figures are those that were logged, and it moves on when they are."""

import re
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meap_lit.recipe.cli import RecipeCLI


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, [0, 5, 10, 12]), (False, [0, 12])])
def test_the_bar_counts_optimizer_steps(toy_recipe, tmp_path, monkeypatch, capsys, is_terminal, shown):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    options = ["--trainer.enable_progress_bar", "true", "--trainer.log_every_n_steps", "5"]
    RecipeCLI.run(["fit", "--config", str(toy_recipe), *options])
    bar = capsys.readouterr().out
    assert sorted({int(step) for step in re.findall(r"step: .*?(\d+)/12 ", bar)}) == shown
    events = EventAccumulator(str(tmp_path / "runs" / "toy" / "version_0"))
    events.Reload()
    logged = {name: events.Scalars(tag)[-1].value for name, tag in (("loss", "train/loss"), ("val/loss", "val/loss"))}
    last = bar.rpartition("12/12")[2]
    for name, value in logged.items():
        assert float(re.search(rf"\b{name}=([0-9.]+)", last)[1]) == pytest.approx(value, rel=0.01), name
    assert "tokens/s=" in last
    assert "v_num" not in bar
