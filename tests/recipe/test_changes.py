import pytest
import torch
import yaml

from meap_lit.recipe.changes import changes_since


def _with_recipe(folder, recipe):
    folder.mkdir()
    torch.save({"recipe": recipe}, folder / "meta.pt")
    (folder / ".metadata").touch()
    return folder


def test_what_changed_within_a_list_is_named(tmp_path):
    step = {"class_path": "a.Step", "init_args": {"input": ["x" * 200], "val_share": 0.02}}
    before = _with_recipe(tmp_path / "step=1.ckpt", yaml.safe_dump({"data": {"preparation": [step], "of": [1]}}))
    now = {"class_path": "a.Step", "init_args": {"input": ["x" * 200], "val_share": 0.03, "new": 1}}
    assert changes_since(before, {"data": {"preparation": [now], "of": [1, 2]}}) == [
        "data.preparation.0.val_share 0.02 -> 0.03",
        "data.of [1] -> [1, 2]",
    ]


@pytest.mark.parametrize("recipe", ["a: 2001-99-99", "a: [", 3, "a: &x [*x]"])
def test_a_damaged_recipe_in_a_checkpoint_says_nothing(tmp_path, recipe):
    assert changes_since(_with_recipe(tmp_path / "step=1.ckpt", recipe), {"a": 1}) == []


def test_a_recipe_in_a_checkpoint_does_not_control_the_terminal(tmp_path):
    before = _with_recipe(tmp_path / "step=1.ckpt", 'a: "\\e[31mred"')
    assert changes_since(before, {"a": 1}) == [r"a \x1b[31mred -> 1"]
