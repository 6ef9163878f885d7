"""Recipes as files: each may name another as its `base`."""

import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace
from omegaconf.errors import InterpolationResolutionError

from meap_lit.data.secrets import without_secrets
from meap_lit.errors import UserError


class KeepsSecrets:
    """A parser of recipes that writes and prints none of their secrets; goes before the class of the parser."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:
        """Parse as the parser does.

        Raises:
            UserError: If a variable of the environment is missing that a value is read from.
        """
        try:
            return super().parse_args(*args, **kwargs)  # type: ignore[misc]
        except InterpolationResolutionError as error:
            variable = re.search(r"Environment variable '(.+?)' not found", str(error))
            if variable is None:
                raise
            key = re.sub(r"^fit\.|\.init_args", "", error.full_key or "a value")
            raise UserError(
                f"{key} comes from the environment, where {variable[1]} is not set; set that variable (saved recipes "
                f"hold no secrets), or change the key"
            ) from error

    def dump(self, namespace: Namespace, *args: Any, skip_link_targets: bool = True, **kwargs: Any) -> str:
        # With the targets of links a dump has no reader: jsonargparse and Lightning take the values from it. A parser
        # of a class within a recipe dumps its part of either.
        is_for_reader = skip_link_targets and not _is_dumping.get()
        shown = namespace
        if is_for_reader:
            if not kwargs.get("skip_validation"):
                self.validate(namespace)  # type: ignore[attr-defined]
            # a reference to the environment would not validate
            shown, kwargs["skip_validation"] = without_secrets(namespace), True
        before = _is_dumping.set(True)
        try:
            return super().dump(shown, *args, skip_link_targets=skip_link_targets, **kwargs)  # type: ignore[misc]
        finally:
            _is_dumping.reset(before)


_is_dumping: ContextVar[bool] = ContextVar("is_dumping", default=False)


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
