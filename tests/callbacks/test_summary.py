import json
import platform

from meap_lit.callbacks.summary import SUMMARY_FILE
from meap_lit.recipe.cli import RecipeCLI


def test_each_part_of_a_run_leaves_what_it_took(toy_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["meap_lit", "fit", "--config", "a recipe.yaml"])
    files = [tmp_path / f"runs/toy/version_{number}" / SUMMARY_FILE for number in range(2)]
    RecipeCLI.run(["fit", "--config", str(toy_recipe), "--budget.max_steps", "3"])
    summary = json.loads(files[0].read_text())
    assert (summary["first_step"], summary["last_step"]) == (0, 3)
    assert summary["tokens"] == 3 * 8 * 32
    # training alone is a part of all the time
    assert 0 < summary["tokens"] / summary["tokens_per_second"] < summary["seconds"]
    assert summary["peak_memory_bytes"] > 1e8
    assert (summary["devices"], summary["nodes"]) == (1, 1)
    assert summary["versions"]["python"] == platform.python_version()
    assert summary["command"] == "python -m meap_lit fit --config 'a recipe.yaml'"

    resumed = ["fit", "--config", str(toy_recipe), "--budget.max_steps", "5", "--ckpt_path", "last"]
    RecipeCLI.run(resumed)
    summary = json.loads(files[1].read_text())
    assert (summary["first_step"], summary["last_step"], summary["tokens"]) == (3, 5, 2 * 8 * 32)
