"""Files that a maintainer or a package index reads agree with the package."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import meap_lit

PROJECT = Path(__file__).parents[1]


def test_every_file_states_the_same_version_and_license():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+)", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == newest[1] == meap_lit.__version__
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (PROJECT / "LICENSE").read_text()


def test_extras_and_dependencies_are_pinned():
    """`constraints.txt` has an exact version of everything that pyproject.toml names."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    named = {re.match(r"[\w.-]+", name)[0].lower() for name in [*project["dependencies"], *extras]} - {"meap-lit"}
    pinned = set(re.findall(r"^([\w.-]+)==", (PROJECT / "constraints.txt").read_text().lower(), re.MULTILINE))
    assert named <= pinned


WITHOUT_EXTRAS = """
import contextlib, io, json, sys
from meap_lit.cli import main
# not scipy and transformers, which other packages import where they find them
sys.modules.update(dict.fromkeys(("gcsfs", "adlfs", "torchao", "lm_eval", "wandb", "mlflow", "trl")))
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(words.split())
    print(json.dumps([words, status, said.getvalue()]))
"""


def test_commands_need_no_package_of_an_extra_before_it_is_used(tmp_path):
    """An installation without extras, as README's: each command comes as far as its own error."""
    expected = {
        "fit --config recipes/quickstart.yaml --model.mask_ratio 10": "model.mask_ratio must be in",
        "evaluate --config recipes/eval/needle.yaml --checkpoint nowhere": "checkpoint nowhere does not exist",
        "judge --config recipes/eval/judge.yaml --predictions nowhere": "nowhere does not exist",
        "report --runs nowhere": "--runs nowhere is not a folder",
        "plan --config nowhere.yaml": "nowhere.yaml does not exist",
        "preview --config nowhere.yaml": "nowhere.yaml does not exist",
        "export --checkpoint nowhere --output out": "checkpoint nowhere does not exist",
        "generate --checkpoint nowhere --prompt a": "checkpoint nowhere does not exist",
        "prepare text --input nowhere --tokenizer nowhere --output out": "nowhere does not exist",
    }
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS],
        input=json.dumps([*expected]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = {words: (status, text) for words, status, text in map(json.loads, result.stdout.splitlines())}
    assert said.keys() == expected.keys(), result.stderr
    for words, (status, text) in said.items():
        assert status == 2, words
        assert expected[words] in text.splitlines()[-1], words
