"""The names that a script finds in the package itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import meap_lit


def test_every_name_is_found():
    assert all(getattr(meap_lit, name).__module__.startswith("meap_lit.") for name in meap_lit.__all__)
    assert set(meap_lit.__all__) <= set(dir(meap_lit))
    with pytest.raises(AttributeError, match="module 'meap_lit' has no attribute 'MEAP'"):
        meap_lit.MEAP  # noqa: B018


def test_type_checkers_see_the_same_names_in_the_same_places():
    tree = ast.parse(Path(meap_lit.__file__).read_text(encoding="utf-8"))
    checked = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("meap_lit.")
        for alias in node.names
    }
    found = {name: f"meap_lit.{module}" for module, names in meap_lit._MODULES.items() for name in names}
    assert checked == found
    assert sorted(found) == sorted(meap_lit.__all__)


def test_the_package_itself_imports_nothing_large():
    large = {"torch", "lightning", "numpy", "transformers", "meap_lit.modules"}
    code = f"import sys, meap_lit, meap_lit.cli; sys.exit(bool({large} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
