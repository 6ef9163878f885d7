"""Recipes that come with the package: found by name from any folder, listed, copied, and whole in a wheel."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from meap_lit.cli import main
from meap_lit.recipe import packaged
from meap_lit.recipe.file import lineage
from meap_lit.recipe.parser import Parser, RecipeFile

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_of(chain: list[Path]) -> list[str]:
    return [os.path.relpath(path, packaged.root()) for path in chain]


def tracked(*folders: str) -> set[str]:
    command = ["git", "-C", str(PROJECT), "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("no git checkout")
    return {name for name in found.stdout.splitlines() if (PROJECT / name).is_file()}


def test_a_recipe_and_its_base_are_found_by_name(elsewhere):
    chain = lineage(Path("recipes/pretrain/meap_0.1b.yaml"))
    assert names_of(chain) == ["recipes/pretrain/base.yaml", "recipes/pretrain/meap_0.1b.yaml"]


def test_a_local_file_wins_also_as_a_base(elsewhere):
    (elsewhere / "recipes" / "pretrain").mkdir(parents=True)
    base = elsewhere / "recipes" / "pretrain" / "base.yaml"
    base.write_text("seed_everything: 2\n")
    first, second = lineage(Path("recipes/pretrain/meap_0.1b.yaml"))
    assert first.resolve() == base
    assert names_of([second]) == ["recipes/pretrain/meap_0.1b.yaml"]


@pytest.mark.parametrize(
    ("file", "base"),
    [
        ("mine.yaml", "recipes/quickstart.yaml"),
        ("experiments/mine.yaml", "../recipes/quickstart.yaml"),
        ("recipes/mine.yaml", "quickstart.yaml"),
    ],
)
def test_a_local_recipe_starts_from_a_packaged_one(elsewhere, file, base):
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text(f"base: {base}\n")
    for path in (Path(file), elsewhere / file):
        assert names_of(lineage(path))[0] == "recipes/quickstart.yaml"


def test_sample_inputs_are_found_and_saved_by_name(elsewhere):
    parser = Parser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_argument("--config", action=RecipeFile)
    parser.add_argument("--input", type=list[str])
    parser.add_argument("--options", type=dict)
    (elsewhere / "a.yaml").write_text(
        "input: [data/instructions.jsonl, data/mine.jsonl]\noptions: {a: {b: data/eval/needles.jsonl}}\n"
    )
    found = parser.parse_args(["--config", "a.yaml"])
    assert found.input == [str(packaged.root() / "data/instructions.jsonl"), "data/mine.jsonl"]
    assert found.options == {"a": {"b": str(packaged.root() / "data/eval/needles.jsonl")}}
    saved = parser.dump(found)
    assert str(packaged.root()) not in saved
    assert "data/instructions.jsonl" in saved
    (elsewhere / "data").mkdir()
    (elsewhere / "data" / "instructions.jsonl").touch()
    assert parser.parse_args(["--config", "a.yaml"]).input[0] == "data/instructions.jsonl"


@pytest.mark.parametrize("text", ["data/a//b/", "data/./x", f"recipes/{'x' * 300}", "data/instructions.jsonl and more"])
def test_a_text_that_only_begins_like_a_name_is_left_as_it_is(elsewhere, text):
    assert packaged.with_paths({"prompt": text}) == {"prompt": text}


def test_recipes_are_listed_with_their_first_sentence(elsewhere, capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = dict(zip(lines[::2], lines[1::2], strict=True))
    assert set(found) == {name for name in tracked("recipes") if name.endswith(".yaml")}
    for name, text in found.items():
        assert re.fullmatch(r"    [A-Z0-9][^\n]*[.]", text), f"{name}: {text}"
        assert len(text) > 12


def test_recipes_are_copied_and_nothing_is_overwritten(elsewhere, capsys):
    assert main(["recipes", "copy", "recipes/quickstart.yaml", "recipes/strategy"]) == 0
    copied = capsys.readouterr().out.splitlines()
    assert copied[0] == "recipes/quickstart.yaml"
    assert len(copied) > 4
    for name in copied:
        assert Path(name).read_bytes() == (packaged.root() / name).read_bytes()
    Path("recipes/quickstart.yaml").write_text("mine")
    for names in ([], ["recipes/quickstart.yaml"], ["recipes/eval", "recipes/quickstart.yaml"]):
        assert main(["recipes", "copy", *names]) == 2
        message = "error: recipes/quickstart.yaml exists and is not overwritten; move it, or name the recipes to copy\n"
        assert capsys.readouterr().err == message
    assert not Path("recipes/eval").exists()
    assert main(["recipes", "copy", "recipes/none"]) == 2
    assert capsys.readouterr().err == "error: no recipe recipes/none; `meap-lit recipes` lists those of this package\n"
    assert main(["recipes", "copy", "quickstart.yaml"]) == 2
    assert capsys.readouterr().err == "error: no recipe quickstart.yaml; did you mean recipes/quickstart.yaml?\n"


def test_everything_is_copied_if_nothing_is_named(elsewhere, capsys):
    assert main(["recipes", "copy"]) == 0
    assert set(capsys.readouterr().out.splitlines()) == tracked("recipes", "data") - {"data/README.md"}


def test_a_recipe_that_is_nowhere(elsewhere, capsys):
    assert main(["fit", "--config", "recipes/unheard_of.yaml"]) == 2
    message = "error: recipe recipes/unheard_of.yaml does not exist; `meap-lit recipes` lists those of this package\n"
    assert capsys.readouterr().err == message


@pytest.mark.slow
def test_a_wheel_holds_the_package_the_recipes_and_the_sample_inputs(tmp_path):
    """Built with what is installed, without a network, from a copy of the files that git knows."""
    pytest.importorskip("setuptools", minversion="77")
    files = tracked("meap_lit", "recipes", "data", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    source = tmp_path / "source"
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((PROJECT / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        scripts = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "meap-lit = meap_lit.cli:main" in wheel.read(scripts).decode()
    package = {name for name in files if name.startswith("meap_lit/")}
    inputs = {name for name in files if name.startswith(("recipes/", "data/"))} - {"data/README.md"}
    assert inputs == set(packaged.names())
    assert held == package | {f"meap_lit/packaged/{name}" for name in inputs}
