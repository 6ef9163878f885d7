"""The bar shows the logged metrics, and advances when they are logged."""

import re
import sys

import pytest

from meap_lit.callbacks.metrics import read_metrics
from meap_lit.recipe.cli import RecipeCLI


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, [0, 5, 10, 12]), (False, [0, 12])])
def test_the_bar_counts_optimizer_steps(toy_recipe, tmp_path, monkeypatch, capsys, is_terminal, shown):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    options = ["--trainer.enable_progress_bar", "true", "--trainer.log_every_n_steps", "5"]
    RecipeCLI.run(["fit", "--config", str(toy_recipe), *options])
    bar = capsys.readouterr().out
    assert sorted({int(step) for step in re.findall(r"step: .*?(\d+)/12 ", bar)}) == shown
    curves = read_metrics(tmp_path / "runs" / "toy" / "version_0")
    logged = {"loss": curves["train/loss"][-1].value, "val/loss": curves["val/loss"][-1].value}
    last = bar.rpartition("12/12")[2]
    for name, value in logged.items():
        assert float(re.search(rf"\b{name}=([0-9.]+)", last)[1]) == pytest.approx(value, rel=0.01), name
    assert "tokens/s=" in last
    assert "v_num" not in bar
