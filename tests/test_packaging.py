"""Files that a maintainer or a package index reads agree with the package."""

import re
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
