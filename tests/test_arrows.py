"""A room of the package imports only what the picture in docs/architecture.md lets it reach."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "meap_lit"
BELOW_ALL = {"errors", "files", "secrets", "provenance", "renamed", "private", "hub", "bounded_yaml", "__version__"}
"""Loose modules that every room may import."""


@cache
def imports() -> dict[str, set[str]]:
    """For each module, by its dotted name below the package, the modules of the package that it imports."""
    modules = {_name(file): file for file in PACKAGE.rglob("*.py")}
    return {name: set(_imported(file, set(modules))) for name, file in modules.items()}


def _name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def _imported(file: Path, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "meap_lit":
            module = node.module.removeprefix("meap_lit").removeprefix(".")
            for alias in node.names:
                name = f"{module}.{alias.name}".removeprefix(".")
                yield name if name in modules or not module else module
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("meap_lit.") for a in node.names if a.name.startswith("meap_lit."))


def rooms() -> dict[str, set[str]]:
    """For each room, the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for name, others in imports().items():
        room = name.split(".")[0]
        found.setdefault(room, set()).update({other.split(".")[0] for other in others} - {room})
    return found


def drawn() -> dict[str, set[str]]:
    """Return the arrows of the picture."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(r"```mermaid\n(.*?)```", text, re.DOTALL)
    assert picture
    arrows: dict[str, set[str]] = {}
    for line in picture[1].splitlines():
        if "-->" in line:
            upper, lower = (re.split(r"\s*&\s*", side.strip()) for side in line.split("-->"))
            for room in upper:
                arrows.setdefault(room, set()).update(lower)
    return arrows


def reachable(room: str, arrows: dict[str, set[str]]) -> set[str]:
    found, waiting = set(), list(arrows.get(room, ()))
    while waiting:
        lower = waiting.pop()
        if lower not in found:
            found.add(lower)
            waiting += arrows.get(lower, ())
    return found


@pytest.mark.parametrize("room", sorted(rooms().keys() - {"__init__", "__main__"}))
def test_a_room_imports_what_is_below_it(room):
    """The package itself is no room: its names are imported when a script asks for them."""
    assert rooms()[room] - BELOW_ALL <= reachable(room, drawn())


def test_every_arrow_of_the_picture_is_an_import():
    actual = rooms()
    assert drawn()
    assert {(upper, lower) for upper, lowers in drawn().items() for lower in lowers - actual[upper]} == set()


def test_the_loose_modules_below_all_import_no_room():
    assert {lower for name in BELOW_ALL & rooms().keys() for lower in rooms()[name]} <= BELOW_ALL


def test_no_circle():
    """Neither between rooms nor between modules; a room's `__init__`, which gathers its names, is left out."""
    packages = {_name(file) for file in PACKAGE.rglob("__init__.py")}
    graph = {name: others - packages for name, others in imports().items() if name not in packages}
    TopologicalSorter(graph).prepare()  # raises CycleError
    TopologicalSorter(rooms()).prepare()


def test_the_method_and_the_model_know_nothing_of_lightning():
    for room in ("masking", "model", "hf", "tokenizer", "inference"):
        files = list((PACKAGE / room).rglob("*.py"))
        assert files, room
        for file in files:
            assert not re.search(r"^\s*(from|import) lightning", file.read_text(encoding="utf-8"), re.MULTILINE), file
