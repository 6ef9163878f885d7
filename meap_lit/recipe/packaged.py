"""Recipes and sample inputs that come with the package, found by the names that they have in its repository.

A wheel holds them in `meap_lit/packaged/`; a checkout has them beside the package. A file of that name in the current
folder takes precedence.
"""

import difflib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from meap_lit.errors import UserError

SAMPLES = ("data/instructions.jsonl", "data/instructions.jinja", "data/eval/needles.jsonl", "data/eval/reasoning.json")
"""The inputs that recipes name and that are part of this project."""


def root() -> Path:
    """Return the folder that holds `recipes/` and `data/`."""
    package = Path(__file__).parents[1]
    in_wheel = package / "packaged"
    return in_wheel if in_wheel.is_dir() else package.parent


def names() -> list[str]:
    """Return the name of every packaged file, recipes first."""
    files = (file for file in (root() / "recipes").rglob("*") if file.is_file())
    return [*sorted(file.relative_to(root()).as_posix() for file in files), *SAMPLES]


def find(path: Path) -> Path:
    """Return `path`, or the packaged file of that name where the current folder has none."""
    if path.exists():
        return path
    name = os.path.relpath(path)  # also of what a `base` such as ../pretrain/base.yaml leads to
    return root() / name if is_packaged(name) else path


def is_packaged(name: str) -> bool:
    """Return whether the package has a recipe or sample input of this name."""
    return (name.startswith("recipes/") or name in SAMPLES) and os.path.isfile(root() / name)


def description(name: str) -> str:
    """Return the first sentence of the comment with which a packaged recipe begins."""
    lines = (root() / name).read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("# ") and not line.startswith("#  "), lines)  # commands follow
    text = " ".join(line.removeprefix("# ").strip() for line in comment)
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0]


def suggestion(name: str) -> str:
    """Return a sentence with the packaged recipe that is meant by a name without folder or ending, or spelled alike."""
    recipes = [file for file in names() if file.endswith(".yaml")]
    stem = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    same = [file for file in recipes if Path(file).name.removesuffix(".yaml") == stem]
    close = difflib.get_close_matches(name, recipes, n=1, cutoff=0.75)
    near = next(iter(same or close), None)
    return f"did you mean {near}?" if near else "`meap-lit recipes` lists those of this package"


def with_paths(options: Any) -> Any:
    """Return a copy of parsed options in which the name of a packaged file is its path, see `find`."""

    def path_of(text: str) -> str:
        name = os.path.normpath(text) if text.startswith(("recipes/", "data/")) else ""
        return str(root() / name) if is_packaged(name) and not os.path.exists(text) else text

    return replace_texts(options, path_of)


def with_names(options: Any) -> Any:
    """Undo `with_paths`: a recipe that is written down names packaged files as any machine finds them."""

    def name_of(text: str) -> str:
        name = text.removeprefix(f"{root()}/")
        return name if is_packaged(name) else text

    return replace_texts(options, name_of)


def replace_texts(value: Any, replacement: Callable[[str], str]) -> Any:
    """Return a copy of nested values with `replacement` applied to each text."""
    if isinstance(value, Namespace):
        return Namespace(**{key: replace_texts(part, replacement) for key, part in vars(value).items()})
    if isinstance(value, dict):
        # keys too: those of `datasets` are folders
        return {replace_texts(key, replacement): replace_texts(part, replacement) for key, part in value.items()}
    if isinstance(value, list):
        return [replace_texts(part, replacement) for part in value]
    return replacement(value) if isinstance(value, str) else value


@dataclass(kw_only=True)
class ListRecipes:
    """List the recipes that come with this package, each with the first sentence of its description."""

    def run(self) -> None:
        for name in names():
            if name.endswith(".yaml"):
                print(f"{name}\n    {description(name)}")


@dataclass(kw_only=True)
class CopyRecipes:
    """Copy packaged recipes into the current folder, to read and edit them.

    Args:
        names: Recipes or folders as `recipes` lists them, such as recipes/quickstart.yaml or recipes/eval; everything,
            with the sample inputs, if none is given.
    """

    names: list[str] = field(default_factory=list, metadata={"positional": True})

    def run(self) -> None:
        """Copy the files and print their names.

        Raises:
            UserError: If a name is unknown, or a file exists. Nothing is copied then.
        """
        chosen = dict.fromkeys(name for asked in self.names or ("recipes", "data") for name in _matches(asked))
        for name in chosen:
            if os.path.lexists(name):
                raise UserError(f"{name} exists and is not overwritten; move it, or name the recipes to copy")
        for name in chosen:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root() / name, name)
            print(name)


def _matches(asked: str) -> Iterator[str]:
    """Yield the packaged files that a name stands for."""
    path = Path(asked)  # of the packaged file itself where the parser has found it, see `with_paths`
    wanted = (path.relative_to(root()) if path.is_relative_to(root()) else path).as_posix()
    found = [name for name in names() if name == wanted or name.startswith(f"{wanted}/")]
    if not found:
        raise UserError(f"no recipe {asked}; {suggestion(asked)}")
    yield from found
