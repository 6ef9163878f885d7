"""Recipes as files: each may name another as its `base`."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace

from meap_lit.errors import UserError


class RecipeFile(ActionConfigFile):
    """Reads a recipe after the recipes that it names as `base`."""

    @staticmethod
    def apply_config(parser: Any, cfg: Namespace, dest: str, value: str) -> None:
        for path in lineage(Path(value)):
            ActionConfigFile.apply_config(parser, cfg, dest, str(path))


def lineage(path: Path) -> list[Path]:
    """The recipe at `path` and all that it is based on, the most basic first.

    Raises:
        UserError: If a file is missing, is a folder, is not YAML, or is based on itself.
    """
    chain: list[Path] = []
    while True:
        if path.resolve() in (other.resolve() for other in chain):
            raise UserError(f"recipe {path} is based on itself")
        if not path.is_file():
            named_by = f" (named as base by {chain[0]})" if chain else ""
            if path.is_dir():
                files = sorted(path.glob("*.yaml"))
                inside = f"name a file in it, such as {files[0]}" if files else "no .yaml lies in it"
                raise UserError(f"recipe {path} is a folder{named_by}; {inside}")
            raise UserError(f"recipe {path} does not exist{named_by}; the recipes of this project lie in recipes/")
        chain.insert(0, path)
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UserError(f"recipe {path} is empty or not a mapping of keys to values")
        if not content.get("base"):
            return chain
        path = path.parent / content["base"]
