"""The help of commands on a recipe: this project's keys, each with its meaning and default, before Lightning's."""

import re

import pytest

from meap_lit.cli import main
from meap_lit.recipe.cli import CALLBACKS, CLASSES
from meap_lit.recipe.explain import option_keys


def page_of(capsys, command: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def option(page: str, key: str) -> str:
    """Return the text about an option, in one line."""
    found = re.search(rf"^  --{re.escape(key)}(?: .*)?\n(?: {{6,}}.*\n)*", page, re.MULTILINE)
    assert found, f"--{key} is not described"
    return " ".join(found[0].split())


def test_the_help_of_fit_begins_with_the_keys_of_this_project(capsys):
    page = page_of(capsys, "fit")
    places = [page.index(f"\n{key}") for key in ("options:", "data:", "model:", "budget:", "checkpoint:", "probe:")]
    places.append(page.index("\ntrainer: "))
    assert places == sorted(places)
    assert page.count("--trainer.", 0, places[-1]) == 2  # of --devices and --nodes
    kinds = [(key, kind) for key, kinds in CLASSES.items() for kind in kinds]
    for key, kind in [*kinds, *CALLBACKS.items()]:
        for name in option_keys(kind):
            is_group = any(other.startswith(f"{name}.") for other in option_keys(kind))
            is_deep = name.count(".") > 1  # such as decoder.rope_scaling.factor
            if not (is_group or is_deep or name.endswith("rope_scaling")):
                assert len(option(page, f"{key}.{name}").split()) > 3
    assert option(page, "model.optimizer.lr").endswith("Peak learning rate. (type: float, default: 0.0004)")
    assert "known subclasses: Constant, Linear, Cosine, WarmupHold, Piecewise)" in option(page, "model.mask_ratio")
    assert "`last` is the newest checkpoint of the runs of this recipe" in option(page, "ckpt_path")
    assert "meap_lit." not in page.partition("\ntrainer: ")[0].replace("python -m meap_lit", "")


def test_the_help_of_plan_begins_with_its_own_options(capsys):
    page = page_of(capsys, "plan")
    assert page.index("--device_memory") < page.index("\nmodel:")
