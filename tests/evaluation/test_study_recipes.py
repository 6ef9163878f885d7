"""The evaluations of the study, at toy size and by their recipes."""

import json
from pathlib import Path

import pytest
import yaml

from meap_lit.cli import main

ROOT = Path(__file__).parents[2] / "recipes" / "study"
RECIPES = sorted(ROOT.glob("eval_*/*.yaml"))
FACTS = sorted(ROOT.glob("eval_facts*/*.yaml"))
TOY = {
    "facts": ["--task.lengths", "[240,300]", "--task.num_items", "2", "--task.num_options", "4"],
    "pairs": ["--task.lengths", "[380]", "--task.num_items", "1"],
    "copying": ["--task.seq_len", "64", "--task.span_len", "8", "--task.distances", "[0,16]", "--task.num_spans", "6"],
    "perplexity": ["--task.seq_len", "64"],
    "attention": ["--task.seq_len", "64"],
}
TOY["copying_random"] = TOY["copying"]
OF_FACTS = ("facts", "pairs", "longer")
"""Their context is made up, or has sentences of a text."""


def test_both_sizes_ask_the_same():
    names = [{path.name for path in RECIPES if path.parent.name == f"eval_{size}"} for size in ("cpu", "gpu")]
    assert names[0] == names[1] == {f"{name}.yaml" for name in TOY}


@pytest.mark.parametrize("size", ["facts", "facts_256"])
def test_contexts_are_as_long_as_the_rows_of_training_or_longer(size):
    rows = yaml.safe_load((ROOT / f"{size}.yaml").read_text())
    recipes = [path for path in FACTS if path.parent.name == f"eval_{size}"]
    lengths = {path.stem: yaml.safe_load(path.read_text())["task"]["init_args"]["lengths"] for path in recipes}
    assert max(lengths["facts"]) == rows["data"]["init_args"]["seq_len"] < min(lengths["longer"])
    assert max(lengths["longer"]) == rows["model"]["init_args"]["decoder"]["max_seq_len"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_of_the_study_runs(recipe, prepared, source_folder, tmp_path):
    words = list(TOY["facts" if recipe in FACTS else recipe.stem])
    words += ["--task.filler", str(prepared.texts)] if recipe.stem in OF_FACTS else ["--task.dataset", prepared.dataset]
    command = ["evaluate", "--config", str(recipe), "--checkpoint", str(source_folder), "--output", str(tmp_path)]
    assert main([*command, *words]) == 0
    (file,) = tmp_path.rglob("result.json")
    assert file.parents[1].name == recipe.stem
    assert json.loads(file.read_text())["results"][0]["scores"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_is_asked_was_held_out(recipe):
    size = recipe.parent.name.removeprefix("eval_")
    content = yaml.safe_load(recipe.read_text())["task"]["init_args"]
    if recipe in FACTS:
        assert "filler" not in content  # the names are drawn for every item
    elif recipe.stem == "facts":
        assert content["filler"] == f"data/study_{size}/text/held_out/prose.jsonl"
    elif "dataset" in content:
        assert content["dataset"] == f"data/study_{size}/text_tokens"
